"""Exact, interruptible training of PyTorch models."""
