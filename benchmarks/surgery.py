"""Side by side with the public pruner Torch-Pruning, on the networks of the zoo: which narrow copies work, and how long
they take. `python -m benchmarks.surgery`; needs `pip install torch-pruning`, which dslify itself does not.

Three contenders, each in a process of its own: the pruner as in its quickstart (the last classifier left alone), the
pruner with its documented help (heads of attention named, parameters outside of layers left to it, group counts kept),
and dslify.insert behind half of the blocks. Width 0.1 everywhere: the pruner narrows the whole network from its input,
dslify what is behind the cut. "Works": forward and backward of the narrow copy, with the network's own output shapes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from benchmarks.children import in_child
from benchmarks.zoo.network import Network

WIDTH = 0.1
GIGABYTES = 12.0  # that one contender may have
CONTENDERS = ("pruner", "pruner with help", "dslify")
Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.surgery", description="Torch-Pruning beside dslify.")
    parser.add_argument("--only", nargs="+", default=["timm"], help="names or groups of the zoo; a name may end in *")
    parser.add_argument("--sample", type=int, metavar="N", help="draw that many of them (the same ones every time)")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit for one network and contender")
    parser.add_argument("--json", type=Path, help="write all records here")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    from benchmarks.zoo.registry import drawn, selected

    if importlib.util.find_spec("torch_pruning") is None:
        print("error: this benchmark needs the pruner it compares with: pip install torch-pruning.", file=sys.stderr)
        return 2
    records = []
    for network in drawn([network for network in selected(options.only) if network.scope is None], options.sample):
        for contender in CONTENDERS:
            record = _in_child(network, contender, options.seconds)
            records.append(record)
            words = "works" if record["works"] else record["reason"]
            print(f"{network.name:<36} {contender:<17} {record['seconds']:7.2f} s  {words}", flush=True)
    print()
    for contender in CONTENDERS:
        rows = [record for record in records if record["contender"] == contender]
        works = [record for record in rows if record["works"]]
        times = [record["seconds"] for record in works] or [float("nan")]
        print(
            f"{contender:<17} works on {len(works)} of {len(rows)}, {len(works) / max(1, len(rows)):.0%}; "
            f"seconds where it works: median {statistics.median(times):.2f}, max {max(times):.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))
    return 0


def contend(network: Network, contender: str) -> Record:
    """One contender on one network, in this process. seconds: of the surgery alone (with dslify's capture)."""
    model = network.build()
    args, kwargs = network.example(2)
    with torch.no_grad():
        expected = _shapes(model(*args, **kwargs))
    start = time.perf_counter()
    try:
        if contender == "dslify":
            narrow, seconds = _dslified(network, model)
        else:
            narrow = _pruned(model, (args, kwargs), with_help=contender != "pruner")
            seconds = time.perf_counter() - start
        reason = _runs(narrow, (args, kwargs), expected)
    except Exception as error:
        seconds, reason = time.perf_counter() - start, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return _record(network, contender, seconds, reason)


def _dslified(network: Network, model: nn.Module) -> tuple[nn.Module, float]:
    """The light route as a module, and the seconds of capture and surgery (choosing the cut is not counted)."""
    import dslify
    from benchmarks.zoo.cuts import chosen_cuts
    from dslify.capture import capture
    from dslify.insert import Request, insert_into

    args, kwargs = network.example(1)
    captured = capture(model, args, kwargs)
    (cut,) = chosen_cuts(model, captured, (0.5,))
    start = time.perf_counter()
    net = insert_into(captured, Request(at=cut, width=WIDTH))
    seconds = captured.seconds + time.perf_counter() - start
    for layer in dslify.dsl_layers(net):
        layer.route = "light"
    return net, seconds


def _pruned(model: nn.Module, example: tuple[Any, Any], with_help: bool) -> nn.Module:
    import torch_pruning

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    options: dict[str, Any] = {"ignored_layers": linear[-1:]}
    attention = [
        m for m in model.modules() if hasattr(m, "num_heads") and isinstance(getattr(m, "qkv", None), nn.Linear)
    ]
    if with_help:
        options["num_heads"] = {module.qkv: module.num_heads for module in attention}
    args, kwargs = example
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example_inputs=kwargs or args,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=1 - WIDTH,
        **options,
    )
    pruner.step()
    if with_help:  # as the pruner's own example for vision transformers does it
        for module in attention:
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
    return model


def _runs(narrow: nn.Module, example: tuple[Any, Any], expected: list[tuple[int, ...]]) -> str:
    """Why the narrow copy does not work, or ''."""
    found = narrow(*example[0], **example[1])
    if _shapes(found) != expected:
        return f"it answers {_shapes(found)} where the network answers {expected}"
    loss = sum(out.abs().mean() for out in pytree.tree_leaves(found) if isinstance(out, Tensor) and out.requires_grad)
    if not isinstance(loss, Tensor):
        return "its answer has no gradient"
    loss.backward()
    return ""


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _in_child(network: Network, contender: str, seconds: float) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "record.json"
        ending = in_child(_contend, network.name, contender, answer, seconds=seconds, gigabytes=GIGABYTES)
        if ending:
            return _record(network, contender, seconds, ending)
        record: Record = json.loads(answer.read_text())
        return record


def _contend(name: str, contender: str, answer: Path) -> None:
    """In the child."""
    from benchmarks.zoo.registry import selected

    (network,) = selected([name])
    answer.write_text(json.dumps(contend(network, contender)))


def _record(network: Network, contender: str, seconds: float, reason: str) -> Record:
    return {
        "network": network.name, "contender": contender, "works": not reason, "seconds": seconds, "reason": reason
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
