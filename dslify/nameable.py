"""What a file may name: operators and functions, paths and names that end up in source, trees of inputs and outputs."""

from __future__ import annotations

import builtins
import dataclasses
import json
import keyword
import math
import operator
import re
from collections import namedtuple
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
import torch.utils._pytree as pytree

from .errors import StoreError

_NAMESPACES = ("aten", "torchvision", "torchaudio", "dslify")
_WITH_SIDE_EFFECTS = ("aten.from_file", "aten._print", "aten.record_stream")  # read files, print
_OF_OPERATOR = """abs add and_ eq floordiv ge getitem gt invert le lshift lt mod mul ne neg not_ or_ pos pow rshift sub
truediv xor"""
_OF_TORCH = "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sum _sym_sqrt"
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OF_OPERATOR.split()},
    **{f"torch.{name}": getattr(torch, name) for name in _OF_TORCH.split()},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "sqrt", "trunc")},
    **{f"builtins.{name}": getattr(builtins, name) for name in ("abs", "float", "int", "max", "min", "round")},
    **{
        f"higher_order.{name}": getattr(torch.ops.higher_order, name)
        for name in ("wrap_with_autocast", "wrap_with_set_grad_enabled")
    },
}
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PART = re.compile(r"[A-Za-z0-9_+:/ -]+")  # of a dotted path: what a ModuleDict may reasonably use; no quote, no escape
_TREES = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_MODEL_OUTPUT = re.compile(r"(transformers\.(?:modeling_outputs|models\.\w+\.modeling_\w+))\.(\w+)")


def operator_named(text: Any) -> torch._ops.OpOverload:
    """ "aten.linear.default" -> the operator. Raises StoreError for all but dispatcher operators without side effects.

    TorchScript's built-ins answer to torch.ops as well (there is an aten::save), so the dispatcher must know the name.
    """
    parts = text.split(".") if isinstance(text, str) else []
    known = len(parts) == 3 and parts[0] in _NAMESPACES and all(_IDENTIFIER.fullmatch(part) for part in parts)
    if known and ".".join(parts[:2]) not in _WITH_SIDE_EFFECTS:
        namespace, name, overload = parts
        if namespace in ("torchvision", "torchaudio"):
            _import_known(namespace)
        schema = f"{namespace}::{name}" if overload == "default" else f"{namespace}::{name}.{overload}"
        found = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
        if isinstance(found, torch._ops.OpOverload) and torch._C._dispatch_has_kernel(schema):
            return found
    raise StoreError(f"a stored graph may not call {str(text)[:100]!r}: it is none of PyTorch's operators.")


def tree_spec(text: Any, arguments: bool = False) -> pytree.TreeSpec:
    """A serialized pytree spec, checked before torch reads it: its contexts can name modules to import.

    arguments: the spec of (args, kwargs), whose keyword names end up in source. Raises StoreError.
    """
    try:
        protocol, tree = json.loads(text)
    except (TypeError, ValueError):
        raise StoreError("the description of the inputs or outputs is damaged.") from None
    need(protocol == 1, "the description of the inputs or outputs is of another version")
    _check_tree(tree)
    spec = pytree.treespec_loads(json.dumps([protocol, tree]))
    if arguments and spec.type is tuple and spec.num_children == 2 and spec.child(1).type is dict:
        for name in spec.child(1).context:
            identifier(name)
    return spec


def _check_tree(tree: Any) -> None:
    kind, context, children = (mapping(tree).get(key) for key in ("type", "context", "children_spec"))
    need(isinstance(children, list), "the description of the inputs or outputs is damaged")
    if kind is None:
        need(context is None and not children, "the description of the inputs or outputs is damaged")
        return
    output = _MODEL_OUTPUT.fullmatch(str(kind))
    if output is not None:
        _import_known(output[1])  # defining the class registers it with pytree
    elif kind not in _TREES:
        raise StoreError(f"inputs and outputs may be nested tuples, lists and dicts; found {str(kind)[:100]}.")
    keys = json.loads(context) if isinstance(context, str) else 0
    named = isinstance(keys, list) and all(isinstance(key, (str, int)) for key in keys)
    need(named or keys is None, "the description of the inputs or outputs is damaged")
    for child in children or ():
        _check_tree(child)


def _import_known(module: str) -> None:
    try:
        import_module(module)
    except ImportError:
        raise StoreError(f"this network needs {module.partition('.')[0]}, which is not installed.") from None


def nameable(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """A tree in which classes that a file may not name are the dicts and tuples of the same entries: a dataclass, an
    output class outside of transformers, a named tuple."""
    if spec.is_leaf():
        return spec
    kind, context, children = spec.type, spec.context, [nameable(child) for child in spec.children()]
    registered = pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    name = str(registered.serialized_type_name) if registered is not None else ""
    if name not in _TREES and not _MODEL_OUTPUT.fullmatch(name):
        if pytree.is_namedtuple_class(kind) or kind is namedtuple:
            kind, context = tuple, None
        elif dataclasses.is_dataclass(kind) and isinstance(context, list):
            keys = context[0] if context and isinstance(context[0], list) else context  # of torch, of transformers
            kind, context = dict, list(keys)
    return pytree.TreeSpec(kind, context, children)


def identifier(name: Any) -> str:
    """A name that may stand in generated source. Raises StoreError."""
    if isinstance(name, str) and _IDENTIFIER.fullmatch(name) and not keyword.iskeyword(name):
        return name
    raise StoreError(f"{str(name)[:100]!r} cannot be a name in a stored graph.")


def check_path(path: Any) -> None:
    """Raises StoreError unless `path` is a dotted path that may stand in generated source."""
    parts = path.split(".") if isinstance(path, str) else [""]
    if not all(_PART.fullmatch(part) and not part.startswith("__") for part in parts):
        raise StoreError(f"{str(path)[:100]!r} cannot be a path in a stored network.")


def mapping(data: Any) -> Mapping[str, Any]:
    need(isinstance(data, Mapping), "an entry is damaged")
    return data


def need(condition: bool, message: str) -> None:
    if not condition:
        raise StoreError(f"{message}.")
