"""One run on disk: its folder, its records, and its one writer."""
