"""What a user writes: the protocol, and how a class is found."""
