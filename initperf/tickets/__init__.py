"""Lottery tickets: the file, the search and its folder, pruning criteria."""
