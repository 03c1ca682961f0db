"""Upkeep of a store: what may leave it, and how a run is copied to another."""
