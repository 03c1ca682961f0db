"""What begins with one checkpoint or an old file: a fork, a score, a conversion."""
