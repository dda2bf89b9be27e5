"""flawsmith learns to find surface defects from good parts alone (method: arXiv 2604.19240)."""

__version__ = "0.1.0"
