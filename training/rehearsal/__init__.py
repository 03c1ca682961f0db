"""What is tried on throw-away objects, in a process of its own, before the first step."""
