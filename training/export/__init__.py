"""A model as a file: the formats, what they are given, and what they make."""
