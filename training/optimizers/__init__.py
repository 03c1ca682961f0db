"""Optimizers, their parameter groups and rates, and their state."""
