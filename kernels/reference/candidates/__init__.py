"""Definitions of the kernels that no layer runs yet."""
