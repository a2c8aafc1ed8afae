"""Numbers as sentences and tables."""
