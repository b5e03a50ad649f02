"""Peak memory of dslify.insert on a Vision Transformer of 304 M parameters, as a multiple of the model's own size.

    make bench-memory

Counted from before the model is built, so that the model itself is 1.0: insert() holds one copy of it beside (the given
network is left untouched), the light path, and one weight at a time in double precision for the permutation test. The
check of the light path runs in a process of its own, which is listed apart; it shares the weights' memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import threading
import time
from pathlib import Path

import timm
import torch

import dslify
from dslify.capture import capture
from dslify.insert import Request, insert_into

MODEL, CUT, LIMIT = "vit_large_patch16_224", "blocks.11", 2.2


def resident() -> int:
    """Bytes of this process in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """The largest resident size within the block, sampled every millisecond."""

    def __enter__(self) -> Peak:
        self.bytes, self._stop = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dslify.insert(
        timm.create_model("resnet18"), "layer2", example_inputs=(torch.randn(1, 3, 32, 32),)
    )  # loads torch.export

    before = resident()
    model = timm.create_model(MODEL)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    start = time.perf_counter()
    with Peak() as capturing:
        captured = capture(model.eval(), (torch.randn(1, 3, 224, 224),))
    captured_at = time.perf_counter()
    with Peak() as cutting:
        net = insert_into(captured, Request(CUT, 0.1))
    done = time.perf_counter()
    (layer,) = dslify.dsl_layers(net)
    found = {
        "model": MODEL,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "bytes": size,
        "capture_peak": (capturing.bytes - before) / size,
        "surgery_peak": (cutting.bytes - before) / size,
        "check_process_peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / size,
        "capture_seconds": captured_at - start,
        "surgery_seconds": done - captured_at,
        "light_parameters": layer.plan.params["light"],
        "limit": LIMIT,
    }
    if options.json:
        print(json.dumps(found))
    else:
        print(f"{MODEL}: {found['parameters'] / 1e6:.0f} M parameters, {size / 1e9:.2f} GB, cut behind {CUT}")
        print(f"peak while capturing  {found['capture_peak']:.2f} times the model, {found['capture_seconds']:.1f} s")
        print(f"peak in the surgery   {found['surgery_peak']:.2f} times the model, {found['surgery_seconds']:.1f} s")
        print(f"check in its process  {found['check_process_peak']:.2f} times the model, memory it shares included")
    if max(found["capture_peak"], found["surgery_peak"]) > LIMIT:
        sys.exit(f"more than {LIMIT} times the model")


if __name__ == "__main__":
    main()
