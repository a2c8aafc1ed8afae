"""Power sums of tensors, and their records."""
