"""Runs of sparse layers in plain torch."""
