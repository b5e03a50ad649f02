"""How sparse what crosses the cut is: which mask makes it so, and what is left to send of a sample that goes on."""

from __future__ import annotations

from torch import Tensor

from .switch import DSLayer, Paths


def mask_words(layer: DSLayer) -> str:
    """Which mask is in use, and its weight sparsity: "24 factors in front of the switch, 12 % of them at zero"."""
    mask = layer.mask
    place = "behind" if layer.unmasked else "in front of"
    if mask.kind == "weight":
        return f"{mask.weight.numel()} factors {place} the switch, {100 * mask.sparsity():.0f} % of them at zero"
    known = f"{mask.weight.numel()} thresholds on the activation, {place} the switch"
    if not mask.on:
        return f"{known}, not in use yet"
    relative = (mask.effective() / mask.magnitude).mean().item()
    return f"{known}, on average {relative:.2f} of a channel's mean magnitude"


def zeros(layer: DSLayer, paths: Paths) -> Tensor:
    """Activation sparsity: share of exact zeros in the masked activation of each sample, or segment; (batch,)."""
    return (layer.pooled(paths.masked) == 0).flatten(1).double().mean(1)


def entries(layer: DSLayer, paths: Paths) -> int:
    """Values in the masked activation of one sample, or segment."""
    return layer.pooled(paths.masked)[0].numel()


def int8_bytes(entries: int, zeros: float) -> float:
    """Bytes of an activation as int8: one for each value that is not zero and a bit for each one, or all of them where
    that is less. Without the scales and the head of a message (runtime.wire)."""
    return min(entries, entries * (1 - zeros) + entries / 8)
