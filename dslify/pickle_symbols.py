"""A pickle read as symbols: which globals it names and what it would do with them, without doing it."""

from __future__ import annotations

import dataclasses
import pickletools
from typing import Any

from torch._utils import IMPORT_MAPPING, NAME_MAPPING

_OPCODES_THAT_PUSH = {
    *("NONE", "NEWFALSE", "NEWTRUE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BININT", "BININT1", "BININT2"),
    *("BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"),
}


class Global(str):
    """A global that a pickle names, as "module.name"."""

    def __new__(cls, module: str, name: str) -> Global:
        self = super().__new__(cls, f"{module}.{name}")
        self.module, self.name = module, name
        return self

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Made:
    """The result of calling or constructing a global; what: the global, or None for anything else."""

    what: Any


@dataclasses.dataclass(frozen=True)
class Use:
    """What a pickle does with a global: "call" it, "new" without its constructor, or set its "state"."""

    kind: str
    what: Any
    args: Any


def symbols(data: bytes) -> tuple[set[Global], list[Use]]:
    """Every global that a pickle names and every use it makes of one, found without importing or calling anything.

    Raises ValueError for an opcode that torch's own weights_only reader would not take either.
    """
    names: set[Global] = set()
    uses: list[Use] = []
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    arg: Any
    for opcode, arg, _ in pickletools.genops(data):
        match opcode.name:
            case "GLOBAL":
                module, _, attribute = arg.partition(" ")
                if (module, attribute) in NAME_MAPPING:  # Python 2 names, as torch maps them
                    module, attribute = NAME_MAPPING[module, attribute]
                else:
                    module = IMPORT_MAPPING.get(module, module)
                stack.append(Global(module, attribute))
                names.add(stack[-1])
            case "NEWOBJ" | "REDUCE":
                args, what = stack.pop(), stack.pop()
                uses.append(Use("new" if opcode.name == "NEWOBJ" else "call", what, args))
                stack.append(Made(what))
            case "BUILD":
                state = stack.pop()
                uses.append(Use("state", stack[-1].what if isinstance(stack[-1], Made) else None, state))
            case "BINPERSID":
                stack[-1] = None
            case "APPEND":
                stack.pop()
            case "SETITEM":
                del stack[-2:]
            case "APPENDS" | "SETITEMS":
                stack = marks.pop()
            case "MARK":
                marks.append(stack)
                stack = []
            case "TUPLE":
                items, stack = tuple(stack), marks.pop()
                stack.append(items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "EMPTY_TUPLE":
                stack.append(())
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "PROTO" | "STOP":
                pass
            case name if name in _OPCODES_THAT_PUSH:
                stack.append(None)
            case name:
                raise ValueError(f"pickle opcode {name}")
    return names, uses
