"""Which operators of the exported network really run on a clip, by ONNX Runtime's own profiler."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dslify
from dslify.cascade import parents
from dslify.errors import ExportError, OptionError
from dslify.onnx_session import require_onnx
from dslify.switch import required_layers

TIMED = 50  # calls, after the profile


def early_stop_profile(net: nn.Module, sounds: Mapping[str, Tensor], timed: int = TIMED) -> dict[str, dict[str, Any]]:
    """Export a network with gates to ONNX, run it on each sound, (1, 1, samples), and tell which nodes ran.

    A network with several gates has them one inside the other's full path, as `dslify insert` makes a cascade. For each
    sound: gate, the number of the one that stopped it, from 1 on, or None; ran, of each part the names of the nodes
    that ran (front, then of gate k "full k" is what comes after it and "light k" the answer of what it stops);
    after_gate, the names that ran behind the gate that stopped it, which has to be none; ms, of one call with one
    thread, median of `timed`; answer, the class.

    Raises OptionError without a gate or with gates that are not one inside the other, ExportError without ONNX Runtime.
    """
    require_onnx("The profile of a network")
    import onnxruntime

    layers = required_layers(net)
    if parents(layers) != (None, *range(len(layers) - 1)):
        raise OptionError("The profile is of gates one inside the other; these lie in a row. Insert them without `to`.")
    with tempfile.TemporaryDirectory() as folder:
        file = dslify.export(net, Path(folder) / "net.onnx", dynamic=False, progress=False).files[0]
        found = {}
        for name, sound in sounds.items():
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            plain = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
            profiling = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            feed = {profiling.get_inputs()[0].name: sound.numpy()}
            answer = profiling.run(None, feed)[0]
            events = json.loads(Path(profiling.end_profiling()).read_text())
            names = [event["name"] for event in events if event["cat"] == "Node"]
            parts = _by_part([name.removesuffix("_kernel_time") for name in names], len(layers))
            stopped = [at for at in range(1, len(layers) + 1) if not parts[f"full {at}"]]
            gate = stopped[0] if stopped else None
            after = [] if gate is None else [n for at in range(gate, len(layers) + 1) for n in parts[f"full {at}"]]
            with torch.no_grad():
                wanted = net(sound).numpy()
            if not np.allclose(answer, wanted, atol=1e-3 * max(1.0, float(np.abs(wanted).max()))):
                raise ExportError(f"The exported network answers {name} otherwise than the network itself.")
            found[name] = {
                "gate": gate, "ran": parts, "after_gate": after, "ms": _median_ms(plain, feed, timed),
                "answer": int(answer.argmax()),
            }  # fmt: skip
    return found


def _by_part(names: list[str], gates: int) -> dict[str, list[str]]:
    """Node names by part: the paths of gate k lie in k - 1 full ones."""
    parts: dict[str, list[str]] = {"front": []}
    for at in range(1, gates + 1):
        parts |= {f"light {at}": [], f"full {at}": []}
    for name in names:
        words = name.replace("full.", "full/").split("/")  # "full.threshold/light" decides inside the full path
        fulls = 0
        while fulls < min(gates, len(words)) and words[fulls] == "full":
            fulls += 1
        if fulls < gates and words[fulls] == "light":
            parts[f"light {fulls + 1}"].append(name)
        else:
            parts[f"full {fulls}" if fulls else "front"].append(name)
    return parts


def _median_ms(session: Any, feed: dict[str, np.ndarray], calls: int) -> float:
    taken = []
    for _ in range(calls):
        begun = time.perf_counter()
        session.run(None, feed)
        taken.append(1e3 * (time.perf_counter() - begun))
    return float(np.median(taken))
