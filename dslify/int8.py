"""One part in ONNX -> the same with int8 weights and activations, by ONNX Runtime's own quantizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnxruntime
from onnx import GraphProto, ModelProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from .attempt import quietly
from .errors import ExportError, one_line
from .int8_report import Feed

OPERATORS = ["Conv", "Gemm", "MatMul"]  # with integer kernels on a CPU; all others only gain conversions


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequence[Feed]):
        self.left: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self.left, None)


def folded(model: ModelProto, path: Path) -> ModelProto:
    """The model with constants and batch norms folded, as the runtime would do it: what stays is what is to quantize.

    path: where the quantizer finds it (onnxruntime 1.31 with onnx 1.23 cannot take one from memory).
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ready = onnx.load(path)
    for at, node in enumerate(ready.graph.node):  # the quantizer leaves nodes out by their names
        node.name = f"{at}/{node.name or node.op_type}"
    used = {node.domain for node in ready.graph.node}
    versions = [entry for entry in ready.opset_import if entry.domain in used]
    del ready.opset_import[:]
    ready.opset_import.extend(versions)
    onnx.save(ready, path)
    return ready


def only_for_score(graph: GraphProto) -> set[str]:
    """Names of the nodes that the score needs and no other output does: the switch."""
    source = {name: node for node in graph.node for name in node.output}

    def above(names: Sequence[str]) -> set[str]:
        found: set[str] = set()
        waiting = [source[name] for name in names if name in source]
        while waiting:
            node = waiting.pop()
            if node.name not in found:
                found.add(node.name)
                waiting += [source[name] for name in node.input if name in source]
        return found

    outputs = [out.name for out in graph.output]
    return above([name for name in outputs if name == "score"]) - above([name for name in outputs if name != "score"])


def int8(part: str, path: Path, feeds: Sequence[Feed], skipped: set[str]) -> ModelProto:
    """The part at `path` quantized but for the nodes in `skipped`, calibrated on `feeds`.

    The weights use 7 of the 8 bits: on CPUs without VNNI instructions sums of products of 8 bits saturate. Measured on
    two convolutions on such a CPU: 18 dB with 8 bits, 34 dB with 7, and 35 dB by the definition of the operators.
    """
    written = path.with_name("int8.onnx")
    try:
        with quietly(), _unlogged():
            quantize_static(
                path, written, _Reader(feeds), quant_format=QuantFormat.QDQ, op_types_to_quantize=OPERATORS,
                per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                nodes_to_exclude=sorted(skipped),
                extra_options={"WeightSymmetric": True, "MatMulConstBOnly": True},
            )  # fmt: skip
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot quantize the {part} part: {one_line(error)}.") from error
    return onnx.load(written)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Within the block nothing is logged: the quantizer advises its own preparation, see folded()."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
