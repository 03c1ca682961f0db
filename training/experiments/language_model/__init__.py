"""A language model on text: characters or a learnt vocabulary."""
