"""The examples run as they are, and stay short."""

import importlib.util
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from dslify.rules import RULES

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGEST = 60  # lines
NEEDS = {"executorch_host": ("executorch", "executorch"), "litert_host": ("litert_torch", "litert")}  # package, extra


@pytest.fixture
def own_rules() -> Iterator[None]:
    """What an example registers is gone after it."""
    known = set(RULES)
    yield
    for name in set(RULES) - known:
        del RULES[name]


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """In this process: a new one takes longer to import torch than most examples run."""
    assert len(example.read_text().splitlines()) <= LONGEST
    package, extra = NEEDS.get(example.stem, ("torch", ""))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        if extra:
            warnings.simplefilter("default")  # those packages warn when they are imported
        runpy.run_path(str(example), run_name="__main__")
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    if importlib.util.find_spec(package) is None:
        assert f"pip install 'dslify[{extra}]'" in said
        return
    assert "the same answers: True" in said
    assert "the network as it was: True" in said
