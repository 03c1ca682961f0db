"""Averages of weights, and of what several models return."""
