"""Moments in plain torch."""
