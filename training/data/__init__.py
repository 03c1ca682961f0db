"""Which samples, in which order, and how they are fetched."""
