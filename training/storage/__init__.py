"""Objects in a bucket: addresses, one small protocol, and which servers are fit for it."""
