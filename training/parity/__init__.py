"""Is the exported file the champion? The checks, in a process of their own."""
