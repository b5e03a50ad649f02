"""fx graphs as JSON that runs nothing when it is read: encode() and decode().

fx turns a graph into Python source and executes it. Everything that ends up there (names, dotted paths, argument
values, tree specs) is therefore held against a short list of forms first. Nothing is looked up by a name from a file
except operators of torch.ops and the functions listed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo

from .errors import StoreError
from .functional import empty_graph_module, tensor_at
from .nameable import FUNCTIONS, check_path, identifier, mapping, nameable, need, operator_named, tree_spec

_FUNCTION_NAMES = {id(function): name for name, function in FUNCTIONS.items()}
_CONSTANTS: dict[str, dict[str, Any]] = {
    kind: {str(value): value for value in vars(torch).values() if isinstance(value, type_)}
    for kind, type_ in (("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format))
}
_DEVICE = re.compile(r"[a-z]+(:\d+)?")


def encode(
    module: fx.GraphModule,
    tensors: dict[str, Tensor] | None = None,
    prefix: str = "",
    submodule: Callable[[nn.Module, str], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A graph module as JSON-able data.

    tensors: receives every parameter and buffer under the name it is met by first (`prefix` + dotted name); one that is
    in it already is referred to, so tied tensors stay tied. submodule(module, prefix): describes modules that the graph
    calls. Inputs and outputs keep tuples, lists, dicts and the output classes of transformers; other dataclasses are
    dicts of the same names when the file is read, and named tuples are tuples. Raises StoreError naming what has no
    place in a file.
    """
    tensors = {} if tensors is None else tensors
    keys = {id(tensor): key for key, tensor in tensors.items()}
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    graphs = {
        str(node.target)
        for node in module.graph.nodes
        if node.op == "get_attr" and isinstance(tensor_at(module, str(node.target)), fx.GraphModule)
    }
    modules: dict[str, Any] = {}  # all in their order, so that parameters keep theirs (optimizers count them)
    names: dict[str, str] = {}
    transient: list[str] = []
    inside = ""
    for path, owner in module.named_modules(remove_duplicate=False):
        if inside and path.startswith(inside):
            continue
        if path:
            check_path(path)
        if path in called or path in graphs:
            inside = f"{path}."
            modules[path] = _encode_called(owner, tensors, prefix + inside, submodule)
            keys = {id(tensor): key for key, tensor in tensors.items()}
            continue
        if path:
            modules[path] = None
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is None:
                continue
            full = f"{path}.{name}" if path else name
            check_path(full)
            names[full] = keys.setdefault(id(tensor), prefix + full)
            tensors.setdefault(names[full], tensor)
            if name in owner._non_persistent_buffers_set:
                transient.append(full)
    return {
        "class": type(module).__name__,
        "codegen": _encode_codegen(module.graph),
        "nodes": [_encode_node(node) for node in module.graph.nodes],
        "tensors": names,
        "transient": transient,
        "modules": modules,
        "meta": module.meta.get("dslify"),
    }


def _encode_called(
    inner: nn.Module,
    tensors: dict[str, Tensor],
    prefix: str,
    submodule: Callable[[nn.Module, str], dict[str, Any]] | None,
) -> dict[str, Any]:
    if submodule is not None:
        return submodule(inner, prefix)
    if isinstance(inner, fx.GraphModule):
        return encode(inner, tensors, prefix)
    raise StoreError(f"{prefix.rstrip('.')} is a {type(inner).__qualname__}, which a stored graph cannot hold.")


def decode(
    data: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    submodule: Callable[[Mapping[str, Any]], nn.Module] | None = None,
) -> fx.GraphModule:
    """The inverse of encode(); `tensors` holds nn.Parameters and buffers, which become the module's own.

    submodule: makes a module from what encode's `submodule` gave. Raises StoreError for anything that encode() would
    not have written.
    """
    need(isinstance(data, Mapping) and isinstance(data.get("nodes"), list), "a graph has no list of nodes")
    net = empty_graph_module(identifier(data["class"]))
    for path, inner in mapping(data["modules"]).items():
        if inner is None:
            _place(net, path, nn.Module())
        else:
            _place(net, path, submodule(inner) if submodule is not None else decode(inner, tensors))
    transient = set(data["transient"])
    for path, key in mapping(data["tensors"]).items():
        need(key in tensors, f"the weights of {path} are missing")
        _place(net, path, tensors[key], path not in transient)
    called = {path for path, inner in data["modules"].items() if inner is not None}
    attributes = {"get_attr": {*data["tensors"], *called}, "call_module": called}
    graph = fx.Graph()
    env: dict[str, fx.Node] = {}
    for item in data["nodes"]:
        name = identifier(mapping(item)["name"])
        need(name not in env, f"two nodes are called {name}")
        env[name] = _decode_node(graph, item, env, attributes)
    if data["codegen"] is not None:
        graph.set_codegen(_decode_codegen(mapping(data["codegen"])))
    graph.lint()
    net.graph = graph
    if data["meta"] is not None:
        net.meta["dslify"] = dict(mapping(data["meta"]))
    return net


def _encode_codegen(graph: fx.Graph) -> dict[str, Any] | None:
    codegen = graph._codegen
    if type(codegen) is CodeGen:
        return None
    if type(codegen) is not _PyTreeCodeGen:
        raise StoreError(f"graphs with {type(codegen).__name__} cannot be stored.")
    info = codegen.pytree_info
    try:
        specs = [
            spec if spec is None else pytree.treespec_dumps(nameable(spec)) for spec in (info.in_spec, info.out_spec)
        ]
    except RuntimeError as error:  # what pytree raises for a type it has no name for is one
        raise StoreError(f"the network's inputs or outputs have a type that cannot be stored: {error}") from None
    for at, text in enumerate(specs):
        if text is not None:
            tree_spec(text, arguments=at == 0)
    return {"arguments": [identifier(name) for name in info.orig_args], "in": specs[0], "out": specs[1]}


def _decode_codegen(data: Mapping[str, Any]) -> _PyTreeCodeGen:
    out = None if data["out"] is None else tree_spec(data["out"])
    arguments = [identifier(name) for name in data["arguments"]]
    return _PyTreeCodeGen(_PyTreeInfo(arguments, tree_spec(data["in"], arguments=True), out))


def _encode_node(node: fx.Node) -> dict[str, Any]:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(operator_named(str(target)))
    elif node.op == "call_function":
        name = _FUNCTION_NAMES.get(id(target), "")
        if not name:
            raise StoreError(f"node {node.name} calls {target!r}, which a stored graph may not.")
    elif node.op in ("placeholder", "get_attr", "call_module", "output"):
        name = str(target)
    else:
        raise StoreError(f"node {node.name} is a {node.op}, which a stored graph may not hold.")
    data: dict[str, Any] = {"op": node.op, "name": identifier(node.name), "target": name}
    data["args"] = [_encode_value(value, node) for value in node.args]
    if node.kwargs:
        data["kwargs"] = {identifier(key): _encode_value(value, node) for key, value in node.kwargs.items()}
    stack = node.meta.get("nn_module_stack")
    if stack:
        data["stack"] = [[key, path, _class_name(kind)] for key, (path, kind) in stack.items()]
    return data


def _class_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def _decode_node(graph: fx.Graph, item: Mapping[str, Any], env: dict[str, fx.Node], attributes: Any) -> fx.Node:
    op, name, target = item["op"], item["name"], item["target"]
    found: Any = target
    if op == "call_function":
        found = FUNCTIONS[target] if isinstance(target, str) and target in FUNCTIONS else operator_named(target)
    elif op in attributes:
        need(target in attributes[op], f"node {name} reads {str(target)[:100]!r}, which the file does not define")
    elif op == "placeholder":
        identifier(target)
    else:
        need(op == "output" and target == "output", f"node {name} has an unknown kind")
    args = tuple(_decode_value(value, env) for value in item["args"])
    kwargs = {identifier(key): _decode_value(value, env) for key, value in mapping(item.get("kwargs", {})).items()}
    node = graph.create_node(op, found, args, kwargs, name=name)
    stack = item.get("stack", [])
    need(all(isinstance(text, str) for entry in stack for text in entry), f"the origin of node {name} is damaged")
    node.meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in stack}
    if op in ("placeholder", "output"):
        del node.meta["nn_module_stack"]
    return node


def _encode_value(value: Any, node: fx.Node) -> Any:
    match value:
        case fx.Node():
            return {"node": value.name}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [_encode_value(item, node) for item in value]
        case tuple() if not hasattr(value, "_fields"):
            return {"tuple": [_encode_value(item, node) for item in value]}
        case dict() if all(isinstance(key, str) for key in value):
            return {"dict": {key: _encode_value(item, node) for key, item in value.items()}}
        case slice():
            return {"slice": [_encode_value(item, node) for item in (value.start, value.stop, value.step)]}
        case torch.device():
            return {"device": str(value)}
    for kind, table in _CONSTANTS.items():
        if str(value) in table and table[str(value)] is value:
            return {kind: str(value)}
    raise StoreError(f"node {node.name} holds a {type(value).__name__}, which cannot be stored.")


def _decode_value(data: Any, env: Mapping[str, fx.Node]) -> Any:
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [_decode_value(item, env) for item in data]
    need(isinstance(data, Mapping) and len(data) == 1, "an argument is damaged")
    ((kind, value),) = data.items()
    if kind == "node":
        need(value in env, f"an argument refers to {str(value)[:100]!r}, which does not come before it")
        return env[value]
    if kind == "dict":
        return {key: _decode_value(item, env) for key, item in mapping(value).items()}
    if kind == "device":
        need(isinstance(value, str) and _DEVICE.fullmatch(value) is not None, "a device name is damaged")
        return torch.device(value)
    if kind in _CONSTANTS:
        need(value in _CONSTANTS[kind], f"{str(value)[:100]!r} is no {kind}")
        return _CONSTANTS[kind][value]
    if kind == "float":
        need(value in ("inf", "-inf", "nan"), "a number is damaged")
        return float(value)
    need(kind in ("tuple", "slice") and isinstance(value, list), "an argument is damaged")
    items = [_decode_value(item, env) for item in value]
    return tuple(items) if kind == "tuple" else slice(*items)


def _place(net: nn.Module, path: str, value: nn.Module | Tensor, persistent: bool = True) -> None:
    """Put a tensor or a module at a dotted path, inside plain containers that are there already."""
    check_path(path)
    *parents, name = path.split(".")
    owner = net
    for part in parents:
        need(type(owner._modules.get(part)) is nn.Module, f"{path} is no place in the network")
        owner = owner.get_submodule(part)
    need(not hasattr(owner, name), f"{path} is no free place in the network")
    if isinstance(value, nn.Module):
        owner.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value, persistent)
