"""The closed-form start of a light path on real data: what insert() knew of it is worked out again from the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from .axes import analyse
from .depth import shallower
from .graft import samples_of
from .inherit import adjusted
from .light import build
from .nest import plain, remember_values
from .notes import recorded_inputs
from .request import COPIES
from .separable import separate
from .switch import DSLayer
from .widths import decide

SAMPLES, BATCH = 64, 16  # that the fit looks at, and how many at once


@torch.no_grad()
def refit(net: nn.Module, layer: DSLayer, batches: Sequence[tuple[Any, ...]]) -> bool:
    """Fit the light path's layers to the full path's by least squares (inherit.adjusted, "fit"), in place.

    batches: values of (cut, *crossing). Only a light path that is still as insert() made it is fitted: one that has
    been trained would lose that. Returns whether it was.
    """
    full, light, plan = layer.full, layer.light, layer.plan
    if (
        plan is None
        or plan.light not in COPIES
        or plan.init != "inherited"
        or not isinstance(full, fx.GraphModule)
        or not isinstance(light, fx.GraphModule)
    ):
        return False
    host = next(m for m in net.modules() if isinstance(m, fx.GraphModule) and layer in m.modules())
    if "dslify" not in host.meta:
        return False
    args, kwargs = pytree.tree_unflatten(recorded_inputs(host), host.graph._codegen.pytree_info.in_spec)  # type: ignore[attr-defined]
    remember_values(host, args, kwargs)
    flat = plain(full)
    region, _ = shallower(flat, plan.depth)
    axes = analyse(region, plan.distrusted, samples_of(full.graph, layer.inputs[0]))
    kept, projected = decide(axes, plan.width, bool(plan.projections))
    again = build(axes, kept, projected)
    if plan.light == "separable":
        separate(again)
    fresh, found = again.state_dict(), light.state_dict()
    if fresh.keys() != found.keys() or not all(torch.equal(fresh[name], found[name].cpu()) for name in fresh):
        return False
    adjusted(light, flat, axes, kept, projected, batches, "fit")
    return True
