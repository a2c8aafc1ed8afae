"""What inference keeps of a weight, and whether the weight was written."""
