"""NASA's turbofan engines: the cycles that are left."""
