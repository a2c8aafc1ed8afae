"""Products of compressed rows, gradients at the survivors, live tiles of a mask."""
