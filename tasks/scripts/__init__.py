"""Scripts of ``holdfast exec``: how one is started, and started again."""
