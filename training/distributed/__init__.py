"""Several processes of one training: ranks, agreement, and sums in a fixed order."""
