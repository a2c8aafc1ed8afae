"""Numbers as SVG."""
