"""The report's page: facts of a run, charts, sections. ``training.report`` is the stage."""
