"""Steps that are done again and compared; nothing of the run is written."""
