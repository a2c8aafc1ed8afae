"""Experiments beside the tickets: width, rescaling, training from scratch, whole units, larger starts."""
