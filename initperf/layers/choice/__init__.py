"""Every decision which product runs, and the figures it is made by."""
