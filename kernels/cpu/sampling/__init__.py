"""Random values of tensors, and what is done to a block of them while it is in the caches."""
