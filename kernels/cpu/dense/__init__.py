"""Our own dense products."""
