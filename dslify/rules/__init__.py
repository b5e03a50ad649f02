"""The rules: one row per ATen overload, as axis equations. Importing this package fills the table."""

from . import contract, norm, pointwise, reduce, view
from .table import RULES, Binding, arguments, leaves, rule, set_argument, shape
from .terms import Axis, Reason, indices, kept_size, product, project

__all__ = [
    "RULES", "Axis", "Binding", "Reason", "arguments", "contract", "indices", "kept_size", "leaves", "norm",
    "pointwise", "product", "project", "reduce", "rule", "set_argument", "shape", "view",
]  # fmt: skip
