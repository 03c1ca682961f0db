"""Copies to and from a device, beside its computation, and files that are read into its memory."""
