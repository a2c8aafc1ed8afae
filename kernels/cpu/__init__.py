"""Numba kernels. Every launcher takes torch CPU tensors and has the signature of its namesake in kernels/reference."""
