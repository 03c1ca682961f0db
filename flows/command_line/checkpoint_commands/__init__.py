"""The commands that begin with a checkpoint, one module each."""
