"""Weight initialization, lottery tickets and layer variance for PyTorch: fast, and the same bits everywhere."""

__version__ = "0.1.0"
