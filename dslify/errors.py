"""What can go wrong because of what a user gave, as one tree.

    DslifyError              any of them: one sentence, exit code 2, nothing written
    ├── LoadError            a file or a name that does not become a model
    │   └── UntrustedError   a file that asks for classes which nobody vouched for
    ├── CaptureError         torch.export cannot see through the model
    ├── CutError             there is no such cut point, or it cannot be cut
    ├── OptionError          a width, a share, a shape ... outside its range
    ├── VerifyError          what the surgery built failed its own checks
    ├── StoreError           a .dsl file that cannot be read or written
    ├── DataError            no usable data
    ├── TrainError           fine-tuning cannot start or go on
    └── ExportError          a format that a network cannot be written in, or a file that differs from it

The message is the whole message: it names the thing, what was found, what was expected and the way out.
"""

from collections.abc import Sequence


class DslifyError(Exception):
    """Base of every error whose cause is the user's input."""


class LoadError(DslifyError):
    pass


class UntrustedError(LoadError):
    pass


class CaptureError(DslifyError):
    pass


class CutError(DslifyError):
    pass


class OptionError(DslifyError, ValueError):
    pass


class VerifyError(DslifyError):
    pass


class StoreError(DslifyError):
    pass


class DataError(DslifyError):
    pass


class TrainError(DslifyError):
    pass


class ExportError(DslifyError):
    pass


def one_line(error: BaseException) -> str:
    """The first line of somebody else's error, for the middle of a sentence of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:200]


def some(names: Sequence[str]) -> str:
    """The first three of many names."""
    shown = ", ".join(str(name)[:80] for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
