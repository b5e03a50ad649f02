"""The fourth file of a split network that routes by segments: what the parts have to see around one, as runtime.Stream.

It is read off the parts themselves, so that what follows the layer counts as well.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from onnx import ModelProto
from torch import fx, nn

from .checked import case, error
from .errors import OptionError
from .functional import empty_graph_module, put_tensor, tensor_at
from .layout import Stretch
from .onnx_format import ALWAYS
from .onnx_stream import stream_model
from .parts import SCORED, Scored
from .programs import Program, Programs, example_of, free_axes
from .receptive import Field, receptive_field
from .runtime import Result, Runner
from .runtime.stream import Stream, piece
from .switch import DSLayer

TRIED = 4  # segments of the sound that an export is tried on, and a part of another one


@dataclass(frozen=True)
class Streamed:
    """stream: for the manifest. model: the front part that goes with it."""

    stream: Stream
    model: ModelProto

    def error(self, programs: Programs, graph: fx.GraphModule, runner: Runner) -> float:
        """The worst difference of what is heard of a sound in odd pieces, light and full by turns, from what each path
        answers there on all of it, as a share of the largest value; and of the scores from the switch's.

        runner: of the parts.
        """
        stream, first = self.stream, programs.front.args[0]
        shape = list(first.shape)
        shape[stream.axis] = TRIED * stream.entries + stream.entries // 3 + 1
        sound = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=first.dtype)
        chunks = sound.tensor_split((stream.entries // 2, stream.entries + 1, 3 * stream.entries), stream.axis)
        found: list[Result] = []
        runner.threshold = ALWAYS
        for result in runner.listen(chunk.numpy() for chunk in chunks):
            found.append(result)
            runner.threshold = -runner.threshold
        whole = {way: case(graph, way, (sound,)).outputs for way in ("light", "full")}
        with torch.no_grad():
            (cut,) = _until_cut(cast(fx.GraphModule, programs.front.module), nn.Identity())(sound)
            scores = [Scored(programs.layer)(part)[1].numpy() for part in cut.split(stream.frames, stream.cut_axis)]
        worst = error([np.concatenate([one.score for one in found])], [np.concatenate(scores)])
        for at, (axis, each) in enumerate(stream.outputs):
            size = stream.frames // stream.cut_step * each
            ends = [None if one is found[-1] else (place + 1) * size for place, one in enumerate(found)]
            wanted = [
                piece(whole[str(one.route)][at], axis, place * size, end)
                for place, (one, end) in enumerate(zip(found, ends, strict=True))
            ]
            heard = [one.outputs[at] for one in found]
            worst = max(worst, error([np.concatenate(heard, axis)], [np.concatenate(wanted, axis)]))
        return worst


def streamed(programs: Programs, graph: fx.GraphModule, front: ModelProto) -> Streamed | str | None:
    """How the parts take a sound that goes on; a sentence if they cannot; None without segments.

    graph: that the programs came from. front: the front part as ONNX.
    """
    layer, light, full = programs.layer, programs.light, programs.full
    if layer.segments is None:
        return None
    if not isinstance(light, Program) or not isinstance(full, Program):
        return _without("a path holds further layers")
    if len(programs.inputs) != 1 or len(programs.front.outputs) != 2:
        return _without("more than one value goes into the network, or crosses the cut")
    if (layer.inputs[0].axis or 0) > layer.channel_axis or layer.inputs[0].per_sample != 1:
        return _without("the activation at the cut does not begin with its samples")
    sizes = front.graph.input[0].type.tensor_type.shape.dim
    axes = [axis for axis in sorted(free_axes(graph)[0]) if axis and sizes[axis].dim_param]
    if len(axes) != 1:
        return _without("its input has no axis, or more than one, that may have any length")
    axis, cut, entries, frames = axes[0], layer.segments.axis, layer.segments.entries, layer.segments.frames
    sound = example_of(graph)[0]
    with torch.no_grad():
        masked = programs.front.module(sound)[0]
    try:
        base = receptive_field(
            base_of(cast(fx.GraphModule, programs.front.module), layer),
            (sound,),
            (Stretch(axis, 1),),
            "What comes before the cut",
        )
        fields = [
            receptive_field(_flat(cast(fx.GraphModule, part.module)), (masked,), (Stretch(cut, 1),), f"The {name} path")
            for name, part in (("light", light), ("full", full))
        ]
    except OptionError as refusal:
        return _without(str(refusal).rstrip("."))
    region = fields[0].joined(fields[1])
    outputs = _outputs(fields[0], region.step_in)
    if outputs != _outputs(fields[1], region.step_in) or not _follows(base) or not all(map(_follows, fields)):
        return _without("its answers are longer than the sound, or those of the two paths are not as long")
    if entries % base.step_in or entries // base.step_in * base.step_out != frames or frames % region.step_in:
        return _without(f"{entries} entries of its input are no whole number of frames at the cut")
    around = (cut, frames, region.step_in, region.before, region.after)
    stream = Stream(axis, entries, base.step_in, base.before, base.after, *around, outputs)
    return Streamed(stream, stream_model(front, layer, cut, frames, region.after))


def _without(reason: str) -> str:
    return f"the parts cannot listen to a sound that goes on (Runner.listen): {reason}"


def _outputs(field: Field, step: int) -> tuple[tuple[int, int], ...]:
    return tuple((cast(int, out.axis), out.at(step)) for out in field.outputs)


def _follows(field: Field) -> bool:
    """Whether no answer is longer than its input: an entry after its end would come too late for its segment."""
    return all(out.extra <= 0 for out in field.outputs)


def base_of(front: fx.GraphModule, layer: DSLayer) -> fx.GraphModule:
    """A front graph of parts.Parts without the switch: (input) -> (masked,)."""
    return _until_cut(front, layer.mask)


def _until_cut(front: fx.GraphModule, last: nn.Module) -> fx.GraphModule:
    """A front graph with another module in place of mask and switch: (input) -> (last(cut),)."""
    own, graph = empty_graph_module("Base"), fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in front.graph.nodes:
        if node.op == "call_module" and node.target == SCORED:
            own.add_module("dsl_last", last)
            graph.output((graph.call_module("dsl_last", (env[node.args[0]],)),))
            break
        env[node] = _put(own, graph, front, node, env)
    own.graph = graph
    return own


def _flat(path: fx.GraphModule) -> fx.GraphModule:
    """A path with the nodes of its region among those of what follows, so that the length of each can be seen."""
    own, graph = empty_graph_module("Path"), fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in path.graph.nodes:
        inner = path.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(inner, fx.GraphModule):
            given, names = iter(node.args), {}
            for each in inner.graph.nodes:
                if each.op == "placeholder":
                    names[each] = env[next(given)]
                elif each.op == "output":
                    env[node] = fx.map_arg(each.args[0], names.__getitem__)
                else:
                    names[each] = _put(own, graph, inner, each, names)
        elif node.target is operator.getitem and isinstance(env.get(node.args[0]), tuple | list):
            env[node] = env[node.args[0]][node.args[1]]
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], env.__getitem__))
        else:
            env[node] = _put(own, graph, path, node, env)
    own.graph = graph
    return own


def _put(own: fx.GraphModule, graph: fx.Graph, source: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    if node.op in ("get_attr", "call_module"):
        put_tensor(own, str(node.target), tensor_at(source, str(node.target)))
    return graph.node_copy(node, env.__getitem__)
