"""The rules: one row per ATen overload, as axis equations. Importing this package fills the table."""

from . import contract, convolve, factories, indexing, norm, pointwise, recurrent, reduce, resize, spectral, view
from .table import RULES, Binding, Scaled, arguments, leaves, rule, set_argument, shape
from .terms import Axis, Reason, concat, indices, kept_size, product, project

_COUNTING = {each.__name__ for each in (contract, convolve, recurrent)}
# overloads whose rows never count multiply-accumulates; a user's own rows may
UNCOUNTED = frozenset(
    name for name, row in RULES.items() if row.__module__.startswith(__name__) and row.__module__ not in _COUNTING
)

__all__ = [
    "RULES", "UNCOUNTED", "Axis", "Binding", "Reason", "Scaled", "arguments", "concat", "contract", "convolve",
    "factories", "indexing", "indices", "kept_size", "leaves", "norm", "pointwise", "product", "project", "recurrent",
    "reduce", "resize", "rule", "set_argument", "shape", "spectral", "view",
]  # fmt: skip
