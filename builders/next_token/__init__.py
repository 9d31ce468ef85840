"""Next-token predictions over texts."""
