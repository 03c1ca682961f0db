"""That this machine goes away: notices, where they come from, and signals."""
