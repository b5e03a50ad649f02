"""dslify: retrofit a Dynamic Switch Layer into a trained PyTorch network.

The public names, imported when first used, so that `import dslify` and `dslify --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = {
    "errors": ["DslifyError"],
    "load": ["example_inputs_for", "load_model"],
    "capture": ["capture"],
    "cut": ["CutPoint", "cut_points"],
    "switch": ["DSLayer", "Mask", "Paths", "Switch", "dsl_layers", "route"],
    "insert": ["insert", "remove"],
    "plan": ["Plan"],
    "store": ["load", "save"],
    "losses": ["dsl_loss"],
    "data": ["open_data"],
    "train": ["finetune"],
    "calibrate": ["calibrate"],
    "cost": ["cost"],
    "measure": ["evaluate"],
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted(_HOME)  # noqa: PLE0605

if TYPE_CHECKING:
    from .calibrate import calibrate as calibrate
    from .cost import cost as cost
    from .insert import insert as insert
    from .insert import remove as remove
    from .measure import evaluate as evaluate
    from .store import load as load
    from .store import save as save
    from .train import finetune as finetune


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        # a room and its main function share a name (insert, cost, calibrate): the function is the public one
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dslify' has no attribute {name!r}")
