"""Spikes: a loss that is not finite or jumps, and the steps that are left out for it."""
