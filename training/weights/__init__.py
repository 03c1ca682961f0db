"""Weights that training does not make: given ones, and frozen ones."""
