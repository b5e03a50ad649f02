"""Rewrites of a captured graph that keep its function: in-place operators become functional, assertions go.

An in-place operator behind the cut would write into the base's activation, which the other path still needs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

_ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "sym_constrain_range")
_IDENTITY_IN_EVAL = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")


def op_name(node: fx.Node) -> str:
    """ "aten.relu_.default" for an ATen call, else "" """
    return _name(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""


@cache
def _name(target: torch._ops.OpOverload) -> str:
    return str(target)


def is_tensor(node: fx.Node) -> bool:
    """Whether the captured value of a node is a tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def tensor_at(module: nn.Module, target: str) -> Any:
    """The parameter, buffer or attribute under a dotted name."""
    *path, name = target.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    return getattr(module, name)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of nested inputs or outputs."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def put_tensor(module: nn.Module, target: str, value: Any) -> None:
    """Put a parameter, buffer or attribute under a dotted name, making the modules on the way."""
    *path, name = target.split(".")
    for part in path:
        if part not in module._modules:
            between = nn.Module()
            between.training = module.training
            module.add_module(part, between)
        module = module._modules[part]  # type: ignore[assignment]
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    elif isinstance(value, torch.Tensor):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


def empty_graph_module(class_name: str) -> fx.GraphModule:
    """A graph module in eval mode to put tensors into, and then its graph: from a root fx would copy name by name."""
    module = fx.GraphModule(nn.Module(), fx.Graph(), class_name=class_name)
    module.training = False
    return module


def parameters_read(module: nn.Module, nodes: Iterable[fx.Node]) -> int:
    """Values of the parameters that the computing ones of `nodes` read, tied ones once."""
    computing = [node for node in nodes if node.op == "call_function"]
    targets = {str(used.target) for node in computing for used in node.all_input_nodes if used.op == "get_attr"}
    tensors = (tensor_at(module, target) for target in targets)
    return sum({id(t): t.numel() for t in tensors if isinstance(t, nn.Parameter)}.values())


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy; torch 2.12 warns of its own deprecation when a graph's pytree spec is copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(module, memo)


def symbolic(size: Any) -> Any:
    """int or sympy expression of an int or SymInt; a SymInt that the capture fixed later is an int."""
    if isinstance(size, int):
        return size
    expression = size.node.expr if hasattr(size, "node") else size
    return int(expression) if expression.is_Integer else expression


def hint_of(size: Any) -> int:
    """An int or SymInt at the example."""
    return size if isinstance(size, int) else int(size.node.hint)


def size_words(value: torch.Tensor) -> tuple[Any, ...]:
    """A captured value's shape, "*" for axes that vary."""
    return tuple(size if isinstance(size, int) else "*" for size in map(symbolic, value.shape))


def graphs_in(module: nn.Module) -> list[fx.GraphModule]:
    """A captured module and the graphs inside it, such as autocast regions."""
    return [child for child in module.modules() if isinstance(child, fx.GraphModule)]


def drop_assertions(graph: fx.Graph) -> None:
    """Remove run-time assertions: the guards at the inputs cover shapes, and a narrow copy has other ones inside."""
    for node in reversed(graph.nodes):
        parts = op_name(node).split(".")
        if len(parts) > 1 and parts[1] in _ASSERTIONS:
            graph.erase_node(node)


def functionalise(graph: fx.Graph, unseen: frozenset[fx.Node] = frozenset()) -> tuple[fx.Node, ...]:
    """Replace in-place ATen operators by functional ones, also inside regions of their own (autocast, no-grad); returns
    those of this graph that had to stay because they write through a view.

    unseen: inputs of the graph whose memory nobody reads afterwards, so that a write to it may go.
    """
    order = {node: at for at, node in enumerate(graph.nodes)}
    kept = []
    for node in list(graph.nodes):
        inner = inner_graph(node)
        if inner is not None:
            body, operands = inner
            inputs = [each for each in body.graph.nodes if each.op == "placeholder"]
            free = {
                each
                for each, operand in zip(inputs, operands, strict=True)
                if operands.count(operand) == 1 and not _seen_afterwards(operand, node, order, unseen)
            }
            functionalise(body.graph, frozenset(free))
            body.recompile()
            if memories_written(node):
                kept.append(node)
            continue
        functional = functional_overload(node)
        if functional is None:
            continue
        written = node.args[0]
        if _seen_through_alias(written, node, order, unseen):
            kept.append(node)
            continue
        node.target = functional
        for user in list(written.users):
            if user is not node and order[user] > order[node]:
                user.replace_input_with(written, node)
    return tuple(kept)


def inner_graph(node: fx.Node) -> tuple[fx.GraphModule, tuple[Any, ...]] | None:
    """The graph that a higher-order operator runs (under autocast or set_grad_enabled), and what it is given."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or node.graph.owning_module is None:
        return None
    for at, value in enumerate(node.args):
        if isinstance(value, fx.Node) and value.op == "get_attr":
            body = tensor_at(node.graph.owning_module, str(value.target))
            if isinstance(body, fx.GraphModule):
                return body, node.args[at + 1 :]
    return None


def functional_overload(node: fx.Node) -> Any:
    """The functional overload of an in-place ATen call, None for any other node."""
    parts = op_name(node).split(".")
    if len(parts) != 3 or not parts[1].endswith("_") or parts[1].endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, parts[0]), parts[1][:-1], None)
    return getattr(packet, parts[2], None)


def writes_in_place(node: fx.Node) -> bool:
    """Whether a call writes into one of its arguments."""
    return bool(memories_written(node))


def memories_written(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that made the memory which a call writes into."""
    written: list[Any] = []
    if isinstance(node.target, torch._ops.OpOverload):
        for at, name in _written_arguments(node.target):
            written.append(node.args[at] if at < len(node.args) else node.kwargs.get(name))
    elif (inner := inner_graph(node)) is not None:
        body, operands = inner
        inputs = [each for each in body.graph.nodes if each.op == "placeholder"]
        inside = {memory for each in body.graph.nodes for memory in memories_written(each)}
        written = [operand for each, operand in zip(inputs, operands, strict=True) if each in inside]
    leaves = pytree.tree_leaves(written) if written else ()
    return tuple(memory_of(value) for value in leaves if isinstance(value, fx.Node))


@cache
def _written_arguments(target: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that an operator writes into."""
    arguments = enumerate(target._schema.arguments)
    return tuple((at, each.name) for at, each in arguments if each.alias_info is not None and each.alias_info.is_write)


def aliases(node: fx.Node) -> fx.Node | None:
    """The argument whose memory the node's value may share, if any."""
    if not isinstance(node.target, torch._ops.OpOverload):
        is_getitem = node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"
        if not is_getitem or not isinstance(node.args[0], fx.Node):
            return None
        inner = inner_graph(node.args[0])
        return _given_out(*inner, int(node.args[1])) if inner is not None else node.args[0]  # type: ignore[arg-type]
    shares = _gives_out_its_input(node.target)
    return node.args[0] if shares and node.args and isinstance(node.args[0], fx.Node) else None


@cache
def _gives_out_its_input(target: torch._ops.OpOverload) -> bool:
    returns = any(value.alias_info is not None for value in target._schema.returns)
    return returns or target._schema.name.split("::")[1] in _IDENTITY_IN_EVAL


def _given_out(body: fx.GraphModule, operands: tuple[Any, ...], at: int) -> fx.Node | None:
    """The operand whose memory a region of its own gives out again as its output `at`, if any."""
    inputs: list[fx.Node] = [node for node in body.graph.nodes if node.op == "placeholder"]
    output = next(iter(reversed(body.graph.nodes))).args[0][at]  # type: ignore[index]
    memory = memory_of(output) if isinstance(output, fx.Node) else None
    return operands[inputs.index(memory)] if memory in inputs else None


def memory_of(node: fx.Node) -> fx.Node:
    """The node that made the memory which `node`'s value may be a view of."""
    while (below := aliases(node)) is not None:
        node = below
    return node


def _seen_through_alias(
    written: Any, writer: fx.Node, order: dict[fx.Node, int], unseen: frozenset[fx.Node] = frozenset()
) -> bool:
    """Whether somebody after `writer` reads the written memory under another name than `written`."""
    return _seen_afterwards(written, writer, order, unseen, but=written)


def _seen_afterwards(
    value: Any, after: fx.Node, order: dict[fx.Node, int], unseen: frozenset[fx.Node], but: fx.Node | None = None
) -> bool:
    """Whether somebody after the node `after` reads the memory of `value` under any name but `but`."""
    if not isinstance(value, fx.Node):
        return False
    root = memory_of(value)
    if root.op in ("placeholder", "get_attr") and root not in unseen:
        return True
    names = {root}
    for node in order:
        if (
            aliases(node) in names and node is not after and node.args[0] is not after
        ):  # what it gives out it has written
            names.add(node)
    return any(order[user] > order[after] for name in names - {but} for user in name.users if user is not after)
