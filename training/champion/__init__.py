"""Which weights win: candidates, and the choice among them."""
