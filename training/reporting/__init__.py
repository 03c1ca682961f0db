"""The report's page: facts of a run, charts, sections. ``stage.py`` is the stage."""
