"""What other teams take: bundles, versions, aliases, and how they are pulled."""
