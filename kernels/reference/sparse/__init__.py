"""Indices and compressed rows in plain torch."""
