"""initialize(model): plan, write, rescale."""
