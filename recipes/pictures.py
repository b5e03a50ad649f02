"""Pictures of a recipe, all in one style: PNG of few colours, so that they are small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dslify.errors import DataError
from dslify.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#1f2328", "#8b949e"


@contextmanager
def picture(path: Path, panels: int, size: tuple[float, float], title: str) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with panels side by side, written as PNG at the end. Raises DataError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise DataError("Pictures need matplotlib: pip install matplotlib.") from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT,
        "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "legend.frameon": False, "legend.fontsize": 8,
        "axes.titlesize": 9, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e9ed", "grid.linewidth": 0.7,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
        yield figure, list(np.atleast_1d(figure.subplots(1, panels)))
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        colours = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(128, dither=Image.Dither.NONE)
        with written_whole(path) as temporary:
            colours.save(temporary, format="PNG", optimize=True)
