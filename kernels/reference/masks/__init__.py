"""Thresholds and masking in plain torch."""
