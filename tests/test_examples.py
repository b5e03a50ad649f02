"""The examples run as they are, and stay short."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGEST = 60  # lines
NEEDS = {"executorch_host": ("executorch", "executorch"), "litert_host": ("litert_torch", "litert")}  # package, extra


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path):
    assert len(example.read_text().splitlines()) <= LONGEST
    package, extra = NEEDS.get(example.stem, ("torch", ""))
    warnings = "default" if extra else "error"  # those packages warn when they are imported
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": warnings}
    ran = subprocess.run([sys.executable, example], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert not list(tmp_path.iterdir())
    if importlib.util.find_spec(package) is None:
        assert f"pip install 'dslify[{extra}]'" in ran.stdout
        return
    assert "the same answers: True" in ran.stdout
    assert "the network as it was: True" in ran.stdout
