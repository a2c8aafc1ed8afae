"""Masked and compressed linear ops in plain torch."""
