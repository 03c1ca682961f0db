"""Prefect tasks: thin, idempotent against the run directory."""
