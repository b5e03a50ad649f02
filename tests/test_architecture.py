"""The rooms keep their order, and the package starts fast."""

import ast
import subprocess
import sys
from pathlib import Path

import dslify

PACKAGE = Path(dslify.__file__).parent
# each room imports only rooms above it
ORDER = [
    "errors", "notes", "named", "omega", "files", "isolate", "garbage", "functional", "guards", "deadline",
    "obstacle", "readings", "recurrent", "attempt", "capture", "macs", "cut", "rules", "depth", "axes", "widths",
    "light", "layers", "inherit", "plan", "verify", "derive", "mask", "switch", "graft", "lengths", "answers",
    "nest", "survey", "nameable", "graph_json", "first_layer", "example_inputs", "listing", "images", "vouched",
    "pickle_symbols", "pickles", "archives", "load", "request", "insert", "stored_modules", "store",
    "output_losses", "losses", "audio", "workers", "samples", "wanted", "arrays", "folders", "items", "data",
    "runs", "run_folder", "schedule", "gather", "gate", "refit", "processes", "team", "joint", "early_stop",
    "stepper", "objectives", "training_run", "train", "cascade", "cost", "probe", "observe", "guarantee",
    "thresholds", "tradeoff", "aim", "calibrate", "resampling", "rivals", "uses", "accuracy", "measure", "tables",
    "evaluated", "parts", "programs", "checked", "onnx_graph", "report", "cut_tree", "picture", "explained", "options", "console", "demo", "learning", "cli",
]  # fmt: skip


def imported_rooms(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {
        node.module.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    }


def test_rooms_import_only_rooms_above():
    rooms = sorted(path for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
    assert {path.stem for path in rooms} | {"rules"} == set(ORDER)
    for path in rooms:
        above = ORDER[: ORDER.index(path.stem)]
        below = imported_rooms(path) - set(above)
        assert not below, f"{path.name} imports {below}, which stand below it"


def test_import_and_help_do_not_load_torch():
    code = "import sys, dslify.cli; dslify.cli.app; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve_to_functions_whatever_was_imported_before():
    from dslify.cost import cost
    from dslify.insert import insert

    assert dslify.cost is cost
    assert dslify.insert is insert
    for name in dslify.__all__:
        assert callable(getattr(dslify, name)), name
