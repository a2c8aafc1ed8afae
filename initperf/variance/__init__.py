"""Moments of tensors, the monitor of layers, its verdicts, loggers and callbacks."""
