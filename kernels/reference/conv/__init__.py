"""Masked convolution in plain torch."""
