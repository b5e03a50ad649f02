"""The surgery: insert() puts a Dynamic Switch Layer into a network, remove() takes it out again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from . import routing
from .answers import answering
from .axes import analyse, node_macs
from .capture import Graph, capture, evaluating, scope_inputs
from .cut import Partition, find_cut, partition
from .derive import Derived, derive
from .errors import OptionError, VerifyError
from .example_inputs import example_for
from .fit_latency import fit_latency
from .functional import copied, parameters_read, size_words
from .garbage import seldom_collected
from .graft import assemble, cut_channels, layouts, make_layer, region_inputs, region_module, samples_of
from .images import pixels_of
from .macs import count, parameter_count
from .nest import flatten, host_of, plain
from .plan import Plan, narrowed, projections
from .request import COPIES, RUNTIMES, Request
from .survey import Survey
from .switch import Layout, dsl_layers, route
from .unlearned import randomise
from .verify import check_light
from .widths import decide

EXACT = 1e-6  # relative: full route against the given network


def insert(
    model: nn.Module,
    at: str,
    width: float | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    scope: str | None = None,
    to: str | None = None,
    mask: str = "channel",
    projection: bool = True,
    cost: float | None = None,
    depth: float = 1.0,
    seed: int = 0,
    light: str | None = None,
    mode: str = "dsl",
    latency: float | None = None,
    runtime: str | None = None,
    progress: bool | None = False,
    init: str = "inherited",
    route_every: int | None = None,
) -> nn.Module:
    """Cut `model` behind `at` and put a Dynamic Switch Layer there.

    model: left untouched, nothing is shared with it. at: path of a submodule ("encoder.block3"), name of a graph node,
    or "auto" (see dslify.choose_cut). width: share of every free axis that the light path keeps, in (0, 1]. cost:
    instead of a width, the share of the region's MACs that the light path may have, in (0, 1). example_inputs,
    example_kwargs: inputs of one forward (tensors of shape (batch, ...)); found out when not given
    (dslify.example_for). scope: submodule whose forward is captured; the rest of the model need not be capturable. to:
    last module of the region (default: everything behind the cut). mask: factors for each "channel" or "element", or
    thresholds on the "activation" of each channel (dslify.mask). projection: let a learned 1x1 projection narrow the
    trunk where that saves MACs. depth: share of the residual branches (by MACs) that the light path keeps, in (0, 1].
    seed: of the switch's first weights. light: what takes the region's place for easy inputs: a "narrow" copy (width,
    cost, depth and projection are about copies alone), a narrow copy whose convolutions are depthwise and pointwise
    ("separable", see dslify.separable), a constant ("exit"), pooled features and a linear layer ("head"), or nothing
    ("identity", with `to`). init: first weights of a copy, "inherited" from the region, or "random" to hold those
    against (dslify.unlearned). mode: "dsl", whose switch predicts the difference between the paths, or "gc", whose
    switch is a gate that learns labels (Gated Compression, arXiv 2303.08970). light is "narrow" for "dsl" and "exit"
    for "gc" unless given. latency: instead of width, cost and depth, the share of the time of what lies behind the cut
    that the light path may take, in (0, 1): of the light paths that do, measured on one thread at the example's size in
    `runtime` ("onnxruntime", unless "eager" is given), the one of most MACs. progress: of that search; None shows it on
    a terminal. route_every: route long sequences segment by segment, so many entries of the network's input each
    (dslify.route_every). A network that holds a layer already gets another one: inside the full path of the first,
    before it or after it.

    Returns a new module in eval mode: the captured graph with a DSLayer as one node, or with `scope` a copy of the
    model that holds it. Its full route is the given network. Untrained, it takes the full path always (threshold 0).
    Raises CaptureError, CutError, OptionError, VerifyError, and with a latency ExportError.
    """
    request = Request(
        at, width, scope, to, mask, projection, cost, depth, seed, light, mode, latency, runtime, init, route_every
    )
    if example_inputs is None:
        example_inputs, example_kwargs, _ = example_for(model)
    inner, args, kwargs = scope_inputs(model, scope, example_inputs, example_kwargs)
    net = (
        insert_again(inner, request, args, kwargs, progress)
        if dsl_layers(inner)
        else insert_into(capture(inner, args, kwargs), request, progress=progress)
    )
    if request.route_every is not None:
        routing.route_every(net, request.route_every)
    if known := pixels_of(model):
        net.meta["dslify"] = {**net.meta["dslify"], "pixels": known.to_json()}
    if scope is None:
        return net
    with evaluating(model):
        whole = copied(model, {id(inner): net})
    whole.eval()
    return whole


def insert_again(
    net: nn.Module, request: Request, args: tuple[Any, ...], kwargs: dict[str, Any], progress: bool | None = False
) -> fx.GraphModule:
    """insert() for a network with layers: into its own graph, or into the full path that the cut lies in."""
    if not isinstance(net, fx.GraphModule):
        inside = next(name for name, module in net.named_modules() if isinstance(module, fx.GraphModule))
        raise OptionError(f"The network has a switched part, {inside}; cut inside it with --scope {inside}.")
    if request.at == "auto":
        raise OptionError("at=auto chooses the first cut of a network, and this one has a layer; name the second cut.")
    net = cast(fx.GraphModule, copied(net))
    host = host_of(net, request.at, args, kwargs)
    if host.layer is not None and host.layer.segments is not None:
        raise OptionError(
            f"--at {request.at} lies inside the full path of a layer that routes by segments, which a second layer "
            "there would not see as such; first let it route whole samples: dslify.route_every(net, None)."
        )
    cut = insert_into(host.graph, request, host.first, progress)
    if host.layer is None:
        return cut
    cut.meta.pop("dslify")
    host.layer.full = cut
    return net


@seldom_collected()
def insert_into(
    captured: Graph, request: Request, first: Layout | None = None, progress: bool | None = False
) -> fx.GraphModule:
    """insert() for a network that is captured already (of the scope, if there is one); consumes the capture.

    first: where the graph's first input keeps its samples (on its first axis). progress: as in insert().
    """
    module, first = captured.module, first or Layout(0)
    samples = samples_of(module.graph, first)
    why = ""
    if request.at == "auto":
        prefix = f"{request.scope}." if request.scope else ""
        point, why = Survey(captured, request.kept, request.projection, prefix).auto()
        request = replace(request, at=point.path.removeprefix(prefix))
    cut = find_cut(module.graph, request.at, module)
    parts = partition(module.graph, cut, find_cut(module.graph, request.to) if request.to else None)
    full = region_module(module, parts)
    inputs = region_inputs(module, parts, captured)
    region = plain(full)
    fit = None
    if request.latency is not None:
        where = request.runtime or RUNTIMES[0]
        fit = fit_latency(region, inputs, request.latency, where, request.projection, request.seed, samples, progress)
        request = replace(request, latency=None, runtime=None, width=fit.chosen.width, depth=fit.chosen.depth)
    separable, copy = request.answer == "separable", request.answer in COPIES
    asked = (request.kept, request.cost, request.depth, request.projection, request.seed, samples, separable)
    derived = (
        derive(region, inputs, *asked) if copy else _answered(module, parts, region, inputs, request, samples, first)
    )
    if request.init == "random":
        randomise(derived.light, request.seed)
    axes, kept, projected = derived.axes, derived.kept, derived.projected
    layer = make_layer(
        module, parts, axes, derived.light, full, inputs, request.mask, request.kind, request.seed, first
    )
    untouched = region is axes.region and not derived.distrusted
    if copy and not separable:
        light_macs = axes.macs(kept, projected)
        plain_macs = axes.macs(*decide(axes, derived.width, projection=False)) if projected else light_macs
    else:
        light_macs = plain_macs = count(derived.light, *inputs)[0] // len(layer.pooled(inputs[0]))
    layer.plan = Plan(
        at=request.at,
        scope=request.scope,
        width=derived.width,
        dynamic=captured.dynamic,
        cut_shape=tuple(map(str, size_words(cut.meta["val"]))),
        crossing=tuple(node.name for node in parts.crossing),
        params={
            "base": parameters_read(module, parts.base),
            "full": parameter_count(region),
            "light": parameter_count(derived.light),
        },
        macs={
            "base": sum(node_macs(module, samples, parts.base).values()),
            "full": axes.macs() if untouched else sum(node_macs(region, samples).values()),
            "light": light_macs,
            **({} if separable else {"unprojected": plain_macs}),
        },
        projections=projections(axes, kept, projected),
        tensors=narrowed(axes, projected, derived.light) if copy else (),
        ledger=axes.ledger if copy else {},
        depth=request.depth,
        dropped=derived.dropped,
        distrusted=derived.distrusted,
        why=why,
        light=request.answer,
        seed=request.seed,
        latency=fit,
        separated=derived.separated,
        init=request.init,
    )
    net = assemble(module, parts, layer)
    leaves = [leaf for leaf in pytree.tree_leaves((captured.args, captured.kwargs)) if isinstance(leaf, Tensor)]
    net.meta["dslify"] = {
        "source": None,
        "at": request.at,
        "scope": request.scope,
        "dynamic": captured.dynamic,
        "example": [[list(leaf.shape), str(leaf.dtype).removeprefix("torch.")] for leaf in leaves],
    }
    _check_full_route(net, captured)
    return net


def _answered(
    module: fx.GraphModule,
    parts: Partition,
    region: fx.GraphModule,
    inputs: tuple[Any, ...],
    request: Request,
    samples: int,
    first: Layout,
) -> Derived:
    """As derive(), with a light path that is no narrow copy; a gate's constants are set from data and not learned."""
    axes = analyse(region, samples=samples)
    entering, leaving = layouts(module, parts, first)
    channel_axis = cut_channels(axes.boundaries[0], entering[0] or Layout(0))
    learned = request.mode != "gc"
    light = answering(request.answer, region, inputs, entering, leaving, channel_axis, learned)
    check_light(light, region, inputs)
    return Derived(region, axes, 0.0, {}, frozenset(), light, (), {})


def remove(net: nn.Module) -> nn.Module:
    """The network without its Dynamic Switch Layers: the full path in their place, with the weights as they are now.

    The mask goes too. Returns a new module (with a scope: a copy of the whole model); `net` is untouched.
    """
    if not dsl_layers(net):
        raise OptionError("This network holds no Dynamic Switch Layer that could be removed.")
    whole = copied(net)
    flatten(whole)
    for module in whole.modules():
        if isinstance(module, fx.GraphModule):
            module.meta.pop("dslify", None)
    return whole


def _check_full_route(net: fx.GraphModule, captured: Graph) -> None:
    with torch.no_grad(), route(net, "full"):
        found = net(*captured.args, **captured.kwargs)
    for mine, theirs in zip(pytree.tree_leaves(found), pytree.tree_leaves(captured.expected), strict=True):
        if isinstance(theirs, Tensor) and theirs.numel():
            scale = theirs.abs().max().double().clamp_min(1e-12) if theirs.is_floating_point() else 1.0
            if not ((mine.double() - theirs.double()).abs().max() / scale <= EXACT) and theirs.isfinite().all():
                raise VerifyError("The full route does not give the network's own answer on the example input.")
