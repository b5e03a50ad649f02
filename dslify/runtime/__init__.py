"""Exported networks in ONNX Runtime: the parts of a split one with a wire between them, or one file.

Needs numpy and onnxruntime, and no torch: this is the part of dslify that goes onto a device.
"""

from .manifest import Manifest
from .result import Result, Statistics
from .runner import Runner
from .single import Single

__all__ = ["Manifest", "Result", "Runner", "Single", "Statistics"]
