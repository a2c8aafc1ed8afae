"""Kernels that no layer runs yet: they are connected or deleted."""
