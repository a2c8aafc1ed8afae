"""Direct sparse convolution."""
