"""Is a resume exact? Tried on somebody's own training, compared, and written down."""
