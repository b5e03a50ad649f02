"""A function of the user's, named as pkg.mod:function. To name it is to agree that it is imported and called."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import DslifyError, OptionError

_NAME = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")


def named_function(name: str, what: str) -> Callable[..., Any]:
    """The function that `name` means, looked for in the working folder too.

    what: it is for, as in "--metric". Raises OptionError for a name of another form, for a module that cannot be
    imported, and for something that cannot be called; what is returned raises it in place of the function's own errors.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise OptionError(f"{what} takes the name of a function, as pkg.mod:function; got {name!r}.")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # a console script does not see the folder that it is started in
    try:
        found: Any = importlib.import_module(parts[1])
        for part in parts[2].split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the user's module raises is told as one sentence, with it as the cause
        raise OptionError(
            f"{what} {name} cannot be imported ({_reason(error)}); expected a module that is installed or in the "
            "working folder, and a function in it."
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise OptionError(f"{what} {name} is of type {type(found).__name__} and cannot be called; name a function.")

    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return found(*args, **kwargs)
        except DslifyError:
            raise
        except Exception as error:
            raise OptionError(f"{what} {name} failed ({_reason(error)}); mend it and try again.") from error

    told.__qualname__ = name
    return told


def _reason(error: Exception) -> str:
    said = str(error).strip().split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
