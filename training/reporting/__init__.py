"""What people look at: facts of a run, charts, sections, the page."""
