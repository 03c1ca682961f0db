"""Trackers: what a durable checkpoint covers is sent to them, once, by a process of its own."""
