"""Triton kernels. Every launcher takes torch tensors and has the signature of its namesake in kernels/reference.

Without a GPU they run in Triton's interpreter (TRITON_INTERPRET=1, set before the first import of triton).
"""
