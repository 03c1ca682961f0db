"""The variables by which ``holdfast exec`` speaks to a script, and the script to it. No torch."""

STORE = "HOLDFAST_STORE"
RUN_ID = "HOLDFAST_RUN_ID"
IS_STRICT = "HOLDFAST_STRICT"
ALLOW_MISMATCH = "HOLDFAST_ALLOW_MISMATCH"
OUTCOME = "HOLDFAST_OUTCOME"
"""A file, in which the script leaves where its run lies and what came of it."""
