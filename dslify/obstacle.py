"""Where a capture got stuck: the line of the user's code, and the submodule it was in."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import sympy
import torch
from torch import nn

_MACHINERY = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, sympy.__file__, __file__))
_PYTHON = f"{sysconfig.get_path('stdlib')}{os.sep}"


def place(error: BaseException, module: nn.Module) -> tuple[str, str | None]:
    """("model.py:12", path of the submodule) where an attempt to trace `module` failed.

    The line is the last one outside of torch, "" if there is none. The path is "" for `module` itself, None if no
    frame of the error tells.
    """
    paths = {id(child): path for path, child in module.named_modules()}
    line, inside = "", None
    for frame, number in _frames(error):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            inside = paths[id(owner)]
        if not _is_machinery(frame.f_code.co_filename):
            line = f"{os.path.relpath(frame.f_code.co_filename)}:{number}"
    return line, inside


def _is_machinery(file: str) -> bool:
    in_python = file.startswith(_PYTHON) and f"{os.sep}site-packages{os.sep}" not in file
    return in_python or file.startswith(("<", *_MACHINERY))


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """(frame, line), outermost first, of the error that the others come from: it got deepest."""
    first = error
    while (cause := first.__cause__ or first.__context__) is not None and cause.__traceback__ is not None:
        first = cause
    for each in (error, first):
        trace = each.__traceback__
        while trace is not None:
            yield trace.tb_frame, trace.tb_lineno
            trace = trace.tb_next
