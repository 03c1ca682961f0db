"""The code of a run: which files of it are kept, and how it is run where they are not."""
