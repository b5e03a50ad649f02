"""dslify: retrofit a Dynamic Switch Layer into a trained PyTorch network.

The public names, imported when first used, so that `import dslify` and `dslify --help` stay fast.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = {
    "errors": ["DslifyError"],
    "example_inputs": ["example_for", "example_inputs_for"],
    "load": ["load_model"],
    "capture": ["capture"],
    "cut": ["CutPoint", "cut_points"],
    "rules": ["rule"],
    "switch": ["DSLayer", "Mask", "Paths", "Switch", "dsl_layers", "route"],
    "survey": ["SurveyPoint", "choose_cut", "survey"],
    "insert": ["insert", "remove"],
    "routing": ["route_every"],
    "plan": ["Plan"],
    "store": ["load", "save"],
    "losses": ["dsl_loss"],
    "joint": ["Joint", "training_network"],
    "data": ["open_data"],
    "vary": ["vary"],
    "train": ["finetune"],
    "tradeoff": ["tradeoff"],
    "calibrate": ["calibrate"],
    "cost": ["cost"],
    "compact": ["compact"],
    "measure": ["evaluate"],
    "export": ["Exported", "export"],
    "latency": ["measure"],
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .calibrate import calibrate as calibrate
    from .capture import capture as capture
    from .compact import compact as compact
    from .cost import cost as cost
    from .cut import CutPoint as CutPoint
    from .cut import cut_points as cut_points
    from .data import open_data as open_data
    from .errors import DslifyError as DslifyError
    from .example_inputs import example_for as example_for
    from .example_inputs import example_inputs_for as example_inputs_for
    from .export import Exported as Exported
    from .export import export as export
    from .insert import insert as insert
    from .insert import remove as remove
    from .joint import Joint as Joint
    from .latency import measure as measure
    from .load import load_model as load_model
    from .losses import dsl_loss as dsl_loss
    from .measure import evaluate as evaluate
    from .plan import Plan as Plan
    from .routing import route_every as route_every
    from .rules import rule as rule
    from .store import load as load
    from .store import save as save
    from .survey import SurveyPoint as SurveyPoint
    from .survey import choose_cut as choose_cut
    from .survey import survey as survey
    from .switch import DSLayer as DSLayer
    from .switch import Mask as Mask
    from .switch import Paths as Paths
    from .switch import Switch as Switch
    from .switch import dsl_layers as dsl_layers
    from .switch import route as route
    from .tradeoff import tradeoff as tradeoff
    from .train import finetune as finetune
    from .training_network import training_network as training_network
    from .vary import vary as vary


class _Index(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # some rooms bear the name of their main function (insert, cost, calibrate): the function is the public one, and
        # the import system must not bind the room over it
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Index
