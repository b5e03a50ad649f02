"""A torch.export archive: torch reads a copy of it that holds raw tensors and vetted strings, nothing that can run."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoadError, StoreError, UntrustedError, one_line
from .nameable import FUNCTIONS, check_path, identifier, operator_named, tree_spec

_UNREAD_KEYS = {"nn_module_stack", "torch_version"}
_QUOTABLE = re.compile(r"[\w ,.:;<>()+*=/-]*")  # torch puts text inputs between quotes in the source of its guards
_PATH_KEYS = {"parameter_name", "buffer_name", "tensor_constant_name", "user_input_name", "fqn", "path_name"}
_DROPPED_KEYS = {"stack_trace", "source_fn_stack", "torch_fn", "custom", "from_node", "treespec_namedtuple_fields"}
_SYMPY = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|ModularIndexing|FloorDiv|CleanDiv|CeilDiv|Where"
    r"|(Ceil|Floor|Trunc|Round)ToInt|TruncToFloat|RoundDecimal|ToFloat|IntTrueDiv|FloatTrueDiv|PowByNatural|FloatPow"
    r"|LShift|RShift|Identity|Eq|Ne|Equality|Unequality|(Strict)?(Less|Greater)Than|And|Or|Not|min|max|abs|int|float|round"
)
_ARITHMETIC = (ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")


def exported(path: Path) -> nn.Module:
    """ep.module() of an archive, after a copy of it that holds only raw tensors and vetted descriptions.

    torch.export.load would unpickle payloads and example inputs, load compiled libraries, and evaluate strings of the
    program (sympy expressions, guards, tree specs that name modules). The example inputs end up on the module, as
    `example_input_array` and `example_kwargs`.
    """
    from torch.export.pt2_archive import PT2ArchiveWriter

    buffer = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, PT2ArchiveWriter(buffer) as writer:
            format_file = next(name for name in archive.namelist() if name.endswith("/archive_format"))
            root = format_file.removesuffix("archive_format")
            program = _vetted(json.loads(archive.read(f"{root}models/model.json")))
            writer.write_bytes("models/model.json", json.dumps(program).encode())
            example = _example(archive.read(f"{root}data/sample_inputs/model.pt"))
            again = io.BytesIO()
            torch.save(example, again)
            writer.write_bytes("data/sample_inputs/model.pt", again.getvalue() if example else b"")
            for kind in ("weights", "constants"):
                config = json.loads(archive.read(f"{root}data/{kind}/model_{kind}_config.json"))
                writer.write_bytes(f"data/{kind}/model_{kind}_config.json", json.dumps(_vetted(config)).encode())
                for file in _payloads(config["config"]):
                    writer.write_bytes(f"data/{kind}/{file}", archive.read(f"{root}data/{kind}/{file}"))
    except StoreError as error:
        raise UntrustedError(f"{path} was not loaded: {error}") from None
    except (KeyError, StopIteration) as error:
        raise LoadError(f"{path} is no archive of torch.export.save: {one_line(error)}.") from None
    except Exception as error:
        raise LoadError(f"{path} is a damaged torch.export archive: {one_line(error)}.") from None
    buffer.seek(0)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torch logs tracebacks of what is one sentence here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(buffer).module()
    except Exception as error:
        raise LoadError(f"{path} cannot be read by PyTorch {torch.__version__}: {one_line(error)}.") from None
    finally:
        logging.disable(disabled)
    _own_memory(module)
    for child in module.modules():
        child.training = False  # .eval() of an exported module raises
    if example is not None:
        module.__dict__.update(example_input_array=example[0], example_kwargs=example[1])
    return module


def _payloads(config: Mapping[str, Any]) -> set[str]:
    for name, payload in config.items():
        if payload["use_pickle"] is not False or not _PAYLOAD.fullmatch(payload["path_name"]):
            raise StoreError(f"{name[:100]} is stored as a pickle, which can run code.")
    return {payload["path_name"] for payload in config.values()}


def _vetted(data: Any, key: str = "") -> Any:
    """The description of a program or of its weights, every string in it known to be harmless where it stands.

    Raises StoreError. Devices become the CPU, and what only served debugging is left out.
    """
    match data:
        case dict() if key in ("device", "as_device"):
            return {"type": "meta" if data.get("type") == "meta" else "cpu", "index": None}
        case dict():
            for name in data:
                check_path(name)
            if "custom_obj" in data or "as_custom_obj" in data:
                raise StoreError("it holds a custom object, which can run code.")
            return {name: _vetted(value, name) for name, value in data.items() if name not in _DROPPED_KEYS}
        case list():
            return [_vetted(value, key) for value in data]
        case str() if key in ("in_spec", "out_spec"):
            tree_spec(data, arguments=key == "in_spec")
        case str() if key in ("target", "as_operator"):
            short = data.removeprefix("torch.ops.").replace("_operator.", "operator.")
            if short not in FUNCTIONS:
                operator_named(short)
        case str() if key in ("expr_str", "guards_code"):
            _check_expression(data)
        case str() if key in ("name", "as_name", "forward_arg_names", "verifiers"):
            identifier(data or "empty")
        case str() if key in _PATH_KEYS:
            check_path(data or "empty")
        case str() if key in ("as_string", "as_strings") and _QUOTABLE.fullmatch(data):
            pass
        case str() if key not in _UNREAD_KEYS:
            raise StoreError(f"it has a text where none belongs ({key[:50]}).")
    return data


def _check_expression(text: str) -> None:
    """Sizes and checks of sizes: numbers, symbols, arithmetic, L['x'].size()[0]. Raises StoreError."""
    try:
        pending: list[ast.AST] = [ast.parse(text, mode="eval").body]
    except (SyntaxError, ValueError):
        pending = [ast.Pass()]
    while pending:
        tree = pending.pop()
        match tree:
            case ast.Constant(value=bool() | int() | float()) | ast.Name(id="L" | "true" | "false" | "oo" | "int_oo"):
                continue
            case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str() as name)], keywords=keywords):
                identifier(name)
                pending += [keyword.value for keyword in keywords]
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if _SYMPY.fullmatch(name):
                pending += [*args, *(keyword.value for keyword in keywords)]
            case ast.Call(func=ast.Attribute(value=value, attr=name), args=args, keywords=[]):
                if isinstance(value, ast.Subscript) and name in ("size", "stride") and not args:
                    pending.append(value)
                elif isinstance(value, ast.Name) and f"{value.id}.{name}" in FUNCTIONS:
                    pending += args
                else:
                    pending.append(ast.Pass())
            case ast.Subscript(value=value, slice=ast.Constant(value=int())):
                pending.append(value)
            case ast.Subscript(value=value, slice=ast.Constant(value=str() as name)):
                identifier(name)  # torch writes it into a message inside double quotes
                pending.append(value)
            case _ if isinstance(tree, _ARITHMETIC):
                pending += ast.iter_child_nodes(tree)
            case _:
                raise StoreError(f"it holds an expression that is no arithmetic of sizes ({text[:60]!r}).")


def _example(data: bytes) -> tuple[Any, dict[str, Any]] | None:
    """The example inputs (args, kwargs) if they are plain values, else None. Their keys get into source code too."""
    try:
        example = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        pending = [example]
        while pending:
            value = pending.pop()
            if type(value) is dict:
                pending += [item for key, item in value.items() if identifier(key)]
            elif type(value) in (tuple, list):
                pending += value
            elif not (value is None or type(value) in (Tensor, bool, int, float)):
                return None
        args, kwargs = example
    except Exception:
        return None
    return (args, kwargs) if type(args) is tuple and type(kwargs) is dict else None


def _own_memory(module: nn.Module) -> None:
    """Move parameters and buffers out of the archive's read-only bytes; those that shared memory become one."""
    memo: dict[Any, Tensor] = {}
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for name, value in table.items():
                if value is not None:
                    place = (value.data_ptr() or id(value), value.shape, value.stride(), type(value))
                    if place not in memo:
                        copy = value.detach().clone()
                        is_weight = isinstance(value, nn.Parameter)
                        memo[place] = nn.Parameter(copy, value.requires_grad) if is_weight else copy
                    table[name] = memo[place]  # type: ignore[assignment]
