"""Several processes of a script's own loop: who starts them, and what they do together."""
