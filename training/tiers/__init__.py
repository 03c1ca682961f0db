"""A run in two tiers: its folder on this machine's scratch disk, and the same in a bucket."""
