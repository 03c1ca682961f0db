"""Training: a segment from the restored state to its end."""
