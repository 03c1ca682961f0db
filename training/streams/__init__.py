"""Stream files: an index that is built once, and samples of them in an order by place."""
