"""A segment of several processes: who starts them, what each does, and how it ends."""
