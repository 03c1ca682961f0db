"""Trainers that people have: their loops stay as they are, and the run is exact."""
