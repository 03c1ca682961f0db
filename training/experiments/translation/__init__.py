"""Translation of sentences, or of generated sums."""
