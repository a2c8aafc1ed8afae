"""Choosing a mask's threshold."""
