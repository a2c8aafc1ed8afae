"""Which statements of the papers a run reproduces."""
