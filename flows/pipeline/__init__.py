"""The flow, its engine, and how it changes machines."""
