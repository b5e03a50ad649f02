"""What all commands share: numbers out of words, a result as text or as one JSON document, an error as one sentence."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from typer import Abort, TyperException
from typer.core import TyperGroup

from .errors import DslifyError, OptionError

USER_ERROR, INTERRUPTED = 2, 130  # exit codes; the second is the shell's for Ctrl-C
COLUMNS = 100  # of a table that goes to a file or a pipe


class Door(TyperGroup):
    """The group of commands. What a user can cause leaves here as one line on stderr and an exit code of 2, Ctrl-C as one
    line and 130; everything else is a fault of dslify and keeps its traceback.
    """

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """As in typer, but errors are told in our words. Ends the process; `standalone_mode` has no effect."""
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except DslifyError as error:
            code = _fail(str(error))
        except TyperException as error:
            code = _fail(_usage(error))
        except Abort:
            code = INTERRUPTED
        except OSError as error:
            if error.filename is None:
                raise
            code = _fail(f"{error.filename}: {error.strerror}; dslify cannot go on without it.")
        if code == INTERRUPTED:
            print("interrupted; what was on disk before is still there", file=sys.stderr)
        sys.exit(code or 0)


class Output:
    """Where a command's result goes: text, or with `as_json` exactly one JSON document on stdout, or with `quiet` nothing.

    Used as a context: with `as_json` whatever the work inside prints goes to stderr, and the document is printed at the
    end if the work succeeded.
    """

    def __init__(self, as_json: bool, quiet: bool):
        self.as_json, self.quiet = as_json, quiet
        self.document: Mapping[str, Any] = {}
        self._stdout = sys.stdout

    @property
    def progress(self) -> bool | None:
        """What the rooms take as `progress`: None (a bar if stderr is a terminal), or False."""
        return False if self.quiet or self.as_json else None

    def __enter__(self) -> Output:
        self._stdout = sys.stdout
        if self.as_json:
            sys.stdout = sys.stderr
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        sys.stdout = self._stdout
        if kind is None and self.as_json:
            print(json.dumps(self.document, indent=2, allow_nan=False))

    def show(self, *parts: Any) -> None:
        """Print rich renderables, and lines of text unchanged and unbroken."""
        if self.as_json or self.quiet:
            return
        from rich.console import Console  # late: `dslify --help` has no use for it

        known = sys.stdout.isatty() or "COLUMNS" in os.environ
        console = Console(file=sys.stdout, width=None if known else COLUMNS)
        for part in parts:
            if isinstance(part, str):
                print(part, flush=True)
            else:
                console.print(part)


def number(
    name: str, text: str, words: str, above: float = -math.inf, least: float = -math.inf, most: float = math.inf, below: float = math.inf
) -> float:
    """`text` as a finite number with above < number < below and least <= number <= most.

    words: the allowed range, as the message says it. Raises OptionError: "width must be above 0 and at most 1; got 1.5."
    """
    try:
        value = float(text)
    except ValueError:
        raise OptionError(f"{name} must be {words}; got {text!r}.") from None
    if not (above < value < below and least <= value <= most and math.isfinite(value)):
        raise OptionError(f"{name} must be {words}; got {text}.")
    return value


def whole(name: str, text: str, least: int = 0) -> int:
    """`text` as a whole number of at least `least`. Raises OptionError."""
    try:
        value = int(text)
    except ValueError:
        raise OptionError(f"{name} must be a whole number of at least {least}; got {text!r}.") from None
    if value < least:
        raise OptionError(f"{name} must be a whole number of at least {least}; got {text}.")
    return value


def size_of(path: Path) -> str:
    """"275 kB", of a file."""
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(1, round(size / 1e3))} kB"


def _fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return USER_ERROR


def _usage(error: TyperException) -> str:
    """The parser's complaint as one sentence that ends in the way out."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "dslify"
    said = " ".join(error.format_message().split()).rstrip(".")
    return f"{said[:1].lower()}{said[1:]}; see {command} --help."
