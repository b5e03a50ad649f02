"""Which labels a gate has learned from, kept in the network, and what to beware of where other data holds others.

A gate is as good as the negatives that it was shown: one that learned on background noise alone lets other speech
through, however well it did on the data that it came from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from .errors import some
from .notes import noted
from .omega import omega
from .samples import Samples

TRAINED = "trained_on"  # name of the note


def label_counts(labels: Sequence[str]) -> dict[str, int]:
    """How many samples have each label, in the order of the labels."""
    return dict(sorted(Counter(labels).items()))


def remember(net: nn.Module, parts: dict[str, Samples], positive: dict[str, Tensor], words: str | None) -> None:
    """Note in the network which labels each phase of its training saw, by what they were to its gates.

    parts, positive: samples and Omega of each phase; what an earlier training noted of others stays.
    words: the label map, None where it was a callable, which cannot be kept.
    """
    graphs = (module for module in net.modules() if isinstance(module, fx.GraphModule) and "dslify" in module.meta)
    graph = next(graphs, None)
    if graph is None:
        return
    phases = {
        name: {
            "positive": label_counts([label for label, one in zip(part.labels, positive[name], strict=True) if one]),
            "negative": label_counts(
                [label for label, one in zip(part.labels, positive[name], strict=True) if not one]
            ),
        }
        for name, part in parts.items()
    }
    before = graph.meta["dslify"].get(TRAINED) or {}
    graph.meta["dslify"][TRAINED] = {**before, **phases, "words": words}


def strange_kinds(net: nn.Module, samples: Samples, positive: Any = None) -> tuple[str, ...]:
    """Remarks on labels of these samples that the network's gates have not been shown; () where nothing was noted.

    positive: which labels are, as `omega` reads it; as in the gates' training when not given. Copies count once.
    """
    trained = noted(net, TRAINED)
    if not trained:
        return ()
    seen = trained.get("switch") or trained["light"]  # where it ran, the gate's own phase
    once = dict(zip(samples.originals, samples.labels, strict=True))
    labels = [label for label in once.values() if label]
    return tuple(_remarks(labels, seen, _sides(labels, seen, trained["words"] if positive is None else positive)))


def _sides(labels: Sequence[str], seen: dict[str, dict[str, int]], words: Any) -> dict[str, bool]:
    """Which labels are positive, of those of which it can be known."""
    known = {**dict.fromkeys(seen["positive"], True), **dict.fromkeys(seen["negative"], False)}
    asked = list(dict.fromkeys(labels))
    if words is None:
        return {label: known[label] for label in asked if label in known}
    return dict(zip(asked, omega(words, [*known, *asked]).positive(asked).tolist(), strict=True))


def _remarks(labels: Sequence[str], seen: dict[str, dict[str, int]], is_positive: dict[str, bool]) -> Iterator[str]:
    counts = label_counts(labels)
    for side, answer, outcome in (("negative", False, "let them through"), ("positive", True, "stop them")):
        own = {label: count for label, count in counts.items() if is_positive.get(label) is answer}
        if strange := [label for label in own if label not in seen[side]]:
            yield (
                f"training saw no {some([repr(label) for label in strange])} among its {side}s, and "
                f"{sum(own[label] for label in strange)} of these {sum(own.values())} {side}s are such: expect the "
                f"gate to {outcome}"
            )
    if unknown := [label for label in counts if label not in is_positive]:
        yield (
            f"training saw no {some([repr(label) for label in unknown])}, and "
            f"{sum(counts[label] for label in unknown)} of these {len(labels)} samples are such: what the gate makes "
            "of them is chance"
        )
