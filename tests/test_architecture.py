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
    "obstacle", "readings", "recurrent", "attempt", "capture", "macs", "counted", "layout", "rates", "receptive",
    "cut", "rules", "depth", "axes", "widths", "light", "layers", "separable", "unlearned", "inherit", "plan",
    "verify", "derive", "mask", "segments", "switch", "sparsity", "graft", "lengths", "answers", "nest", "survey",
    "nameable", "graph_json", "first_layer", "example_inputs", "listing", "images", "vouched", "pickle_symbols",
    "pickles", "archives", "load", "samples", "kinds", "clock", "parts", "programs", "onnx_recurrent",
    "onnx_registry", "onnx_graph", "onnx_session", "routing", "request", "fit_latency", "insert", "stored_modules",
    "store", "output_losses", "losses", "audio", "workers", "wanted", "vary", "arrays", "folders", "items", "data",
    "runs", "run_folder", "schedule", "segmented", "gather", "gate", "refit", "processes", "team",
    "training_network", "joint", "early_stop", "stepper", "objectives", "training_run", "train", "cascade", "cost",
    "slicing", "zeros", "zero_axes", "zero_channels", "producers", "compact", "probe", "observe", "guarantee",
    "rising", "thresholds", "tradeoff", "aim", "budget", "calibration", "lost", "gate_thresholds", "calibrate",
    "resampling", "rivals", "uses", "accuracy", "measure", "tables", "evaluated", "checked", "int8_report",
    "written", "conditional", "pt2_format", "undelegated", "spectra", "executorch_int8", "executorch_format",
    "litert_format", "int8", "quantize", "runtime", "split_manifest", "onnx_format", "onnx_stream", "split_stream",
    "split", "export", "energy", "engines", "device_engines", "measurement", "latency", "measured", "routed",
    "report", "cut_tree", "picture", "explained", "options", "console", "demo", "learning", "deploying", "cli",
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
    assert {path.stem for path in rooms} | {"rules", "runtime"} == set(ORDER)
    for path in rooms:
        above = ORDER[: ORDER.index(path.stem)]
        below = imported_rooms(path) - set(above)
        assert not below, f"{path.name} imports {below}, which stand below it"


def test_the_runtime_needs_only_numpy_and_onnxruntime():
    for path in sorted((PACKAGE / "runtime").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [entry.name for entry in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2 or node.module == "errors", f"{path.name} imports {node.module} of the package"
                names = [str(node.module)] if node.level == 0 else []
            strange = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
            assert strange <= {"numpy", "onnxruntime"}, f"{path.name} imports {strange}"


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
