"""What the user vouches for by name: folders to import from, modules to trust, files to execute."""

from __future__ import annotations

import _compat_pickle
import importlib
import importlib.util
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import LoadError, one_line

PYTHON = {*sys.stdlib_module_names, *_compat_pickle.IMPORT_MAPPING}  # with Python 2's names
Written = Mapping[str, list[types.ModuleType]]  # the user's own files, by the names a pickle may know them by


@contextmanager
def working_folder_first(folder: str | None = None) -> Iterator[None]:
    """The working folder (or `folder`) on sys.path while what the user named is imported."""
    entry = folder or os.getcwd()
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def executed(code: tuple[str | os.PathLike[str], ...]) -> Written:
    """The modules made of the user's files, by the names that a pickle may know them by."""
    made: dict[str, list[types.ModuleType]] = {}
    for file in code:
        path = Path(file)
        if not path.is_file():
            raise LoadError(f"--code {path}: there is no such file.")
        name = f"dslify_code_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise LoadError(f"--code {path} is no Python file; its name has to end in .py.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and copies look their module up there
        try:
            with working_folder_first(str(path.resolve().parent)):
                spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # a script without the __main__ guard may exit
            del sys.modules[name]
            raise LoadError(f"--code {path} failed: {type(error).__name__}: {one_line(error)}.") from error
        for key in ("__main__", path.stem):
            made.setdefault(key, []).append(module)
    return made


def check_trust(trust: tuple[str, ...]) -> None:
    for name in trust:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
            raise LoadError(f"--trust takes the name of a module, such as package.module; got {name!r}.")
        if name.partition(".")[0] in PYTHON:
            raise LoadError(
                f"--trust {name}: no network lives in Python's own library, whose functions can do anything."
            )
