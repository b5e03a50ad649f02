"""ONNX Runtime sessions on the CPU, and what is said where a package for ONNX is missing."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from .errors import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto

PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def require_onnx(what: str) -> None:
    """Raises ExportError if a package is missing that `what`, the beginning of the sentence, needs."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ExportError(f"{what} needs {package}; install it with pip install 'dslify[onnx]'.")


def session(model: ModelProto, threads: int = 1) -> Any:
    """A session for a model in memory."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
