"""Exact, interruptible training of PyTorch models. Importing this package imports nothing else."""
