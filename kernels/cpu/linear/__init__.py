"""Launchers of the masked and the compressed linear ops."""
