"""What can be set: the keys, how they are read, and what is said of wrong ones."""
