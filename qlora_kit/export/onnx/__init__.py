"""Export a run for ONNX Runtime."""

from .exporting import export as export
