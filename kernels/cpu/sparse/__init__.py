"""Products at the survivors of a mask: the index, the storage of weights, the loops."""
