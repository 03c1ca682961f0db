"""Training scripts that keep their own loop: what they hand over, and when their state is whole."""
