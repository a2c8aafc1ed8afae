"""Random values of tensors."""
