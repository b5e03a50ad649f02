"""What the zoo knows of one network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """One network of the zoo, with random weights.

    name, group: what `--only` selects. make: builds it. inputs: batch size -> positional inputs. kwargs: batch size ->
    keyword inputs. scope: as in dslify.insert, where a part of the network cannot be captured by its nature. at: cuts
    that are always tried besides the chosen ones.
    """

    name: str
    group: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]] = lambda batch: ()
    kwargs: Callable[[int], dict[str, Any]] = lambda batch: {}
    scope: str | None = None
    at: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """In eval mode; the same weights every time."""
        torch.manual_seed(0)
        return self.make().eval()

    def example(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of one forward; the same values every time."""
        torch.manual_seed(1)
        return self.inputs(batch), self.kwargs(batch)


def noise(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Inputs of one tensor of normal noise: (batch, *shape)."""
    return lambda batch: (torch.randn(batch, *shape),)
