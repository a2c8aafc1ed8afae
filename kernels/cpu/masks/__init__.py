"""Choosing a mask's threshold, and zeroing what a mask prunes."""
