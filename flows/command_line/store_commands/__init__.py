"""The commands that look after a store, one module each."""
