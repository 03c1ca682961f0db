"""Checkpoints: durable or absent, never half there."""
