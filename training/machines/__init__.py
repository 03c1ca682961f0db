"""Several machines of one training: where they meet, who is there, and who is lost."""
