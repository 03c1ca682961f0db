"""The commands that look at an experiment, a script or a machine, and change nothing."""
