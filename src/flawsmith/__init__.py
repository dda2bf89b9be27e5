"""flawsmith learns to find surface defects from good parts alone (method: arXiv 2604.19240)."""

import os

__version__ = "0.1.0"

# Read when onnxruntime is imported; without it an id and a database go to the home folder, and events to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
