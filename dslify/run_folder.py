"""The run folder of a fine-tuning run: what was asked, where it ran, how it went, and checkpoints to go on from.

    RUN/config.json        options and digests of data and network; a resumed run has to have the same
    RUN/environment.json   versions of what it ran on
    RUN/data.json          one hash a sample that training has seen, so that calibration can tell
    RUN/labels.json        how many samples of each label every phase saw
    RUN/history.jsonl      one line a step
    RUN/tensorboard/       the same curves for TensorBoard
    RUN/checkpoints/       step-000100.pt ...: the last KEPT; with early stopping best.pt, the best of the phase on the
                           samples held out for that; and final.pt of a finished run

Every file is written beside its final name and renamed, so a run that dies at any moment leaves whole files.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .errors import TrainError
from .files import written_whole

KEPT = 3
FINAL, BEST = "final.pt", "best.pt"
VERSION = 2


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary name in the same folder, then rename it to `path`. Raises TrainError."""
    try:
        with written_whole(path) as temporary:
            write(temporary)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        raise TrainError(
            f"{path} cannot be written ({reason}); earlier checkpoints are whole: make room or make it writable, "
            "then resume."
        ) from error


class RunFolder:
    """One run's files. `create` starts a folder, `reopen` goes on with one; both return it ready for use."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lines: list[str] = []
        self._board: Any = None
        self._made = False

    @classmethod
    def create(
        cls, path: Path, config: dict[str, Any], seen: dict[str, Any], labels: dict[str, Any], first: dict[str, Any]
    ) -> RunFolder:
        """A new run in `path`; `first` is the checkpoint at step 0.

        Raises TrainError when the folder holds a run or anything else already, or cannot be made.
        """
        folder = cls(path)
        if (path / "config.json").exists():
            raise TrainError(f"{path} holds a run already; resume that one, or name another run folder.")
        if foreign := folder._foreign():
            raise TrainError(f"{path} holds other files ({foreign}) and no run; name a new or an empty run folder.")
        folder._made = not path.exists()
        try:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            (path / "history.jsonl").write_text("")
        except OSError as error:
            raise TrainError(f"The run folder {path} cannot be made ({error.strerror}); name another one.") from error
        folder.save(0, first)
        folder._write_json("environment.json", environment())
        folder._write_json("data.json", seen)
        folder._write_json("labels.json", labels)
        folder._write_json("config.json", config)  # last: a folder with a config is a run that can be resumed
        return folder

    @staticmethod
    def find(path: Path | None) -> None:
        """Raises TrainError when there is no run to resume in `path`."""
        if path is None:
            raise TrainError(
                "There is nothing to resume: no run folder was given; name the one of the interrupted run."
            )
        if not (path / "config.json").is_file():
            raise TrainError(f"There is no run to resume in {path}; start it without resume, or name another folder.")

    @classmethod
    def reopen(cls, path: Path, config: dict[str, Any]) -> tuple[RunFolder, dict[str, Any], list[dict[str, Any]]]:
        """The folder, its last whole checkpoint and the lines of history up to it.

        Raises TrainError when there is no run, when it was started with other options, data or network, or when no
        checkpoint can be read.
        """
        cls.find(path)
        folder = cls(path)
        try:
            before = json.loads((path / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise TrainError(f"{path / 'config.json'} cannot be read ({error}); start a new run folder.") from error
        wanted = json.loads(json.dumps(config))
        changed = [
            f"{key} was {before.get(key)} and is {wanted.get(key)}"
            for key in sorted({*before, *wanted})
            if before.get(key) != wanted.get(key)
        ]
        if changed:
            raise TrainError(
                f"The run in {path} cannot be resumed with another configuration: {'; '.join(changed)}. Give the same "
                "options, data and network, or start a new run folder."
            )
        state = folder._last()
        lines = []
        history = path / "history.jsonl"
        for line in history.read_text().splitlines() if history.is_file() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the run died
                break
            if entry["step"] > state["step"]:
                break
            lines.append(entry)
        reached = lines[-1]["step"] if lines else 0
        if lines and reached < state["step"]:
            raise TrainError(
                f"{history} ends at step {reached}, before the checkpoint of step {state['step']}; start a new run."
            )
        kept = "".join(json.dumps(entry) + "\n" for entry in lines)
        write_whole(history, lambda where: where.write_text(kept))
        return folder, state, lines

    def log(self, entry: dict[str, Any]) -> None:
        """Keep one step's numbers; they reach the disk with the next checkpoint."""
        self._lines.append(json.dumps(entry) + "\n")
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # late: it takes a second to import

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=entry["step"])
        for name, value in entry.items():
            if name not in ("step", "phase"):
                self._board.add_scalar(f"{entry['phase']}/{name}", value, entry["step"])

    def save(self, step: int, state: dict[str, Any], final: bool = False) -> None:
        """Write history, then a checkpoint of `step`; then drop the checkpoints before the last KEPT."""
        try:
            with (self.path / "history.jsonl").open("a") as history:
                history.writelines(self._lines)
                history.flush()
                os.fsync(history.fileno())
        except OSError as error:
            raise TrainError(
                f"The run folder {self.path} cannot be written ({error.strerror}); resume elsewhere."
            ) from error
        self._lines.clear()
        self._checkpoint(FINAL if final else f"step-{step:06d}.pt", step, state)
        for old in self._numbered()[:-KEPT]:
            old.unlink(missing_ok=True)
        if self._board is not None:
            self._board.flush()

    def save_best(self, step: int, state: dict[str, Any]) -> None:
        """A checkpoint of `step` as the best so far; nothing resumes from it."""
        self._checkpoint(BEST, step, state)

    def _checkpoint(self, name: str, step: int, state: dict[str, Any]) -> None:
        content = {"version": VERSION, "step": step, **state}
        write_whole(self.checkpoints / name, lambda where: torch.save(content, where))

    @property
    def finished(self) -> bool:
        return (self.checkpoints / FINAL).exists()

    def discard(self) -> None:
        """Remove a run that came to nothing: all that `create` wrote."""
        self.close()
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        if self._made:
            self.path.rmdir()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _last(self) -> dict[str, Any]:
        """The newest checkpoint that can be read: weights only, nothing in the file is run."""
        for path in (self.checkpoints / FINAL, *reversed(self._numbered())):
            try:
                state = torch.load(path, weights_only=True, map_location="cpu")
                if state["version"] == VERSION:
                    return state
            except Exception:  # missing, or damaged by something else: the one before will do
                continue
        raise TrainError(f"No checkpoint in {self.checkpoints} can be read; start a new run folder.")

    def _foreign(self) -> str | None:
        """Something in the folder that a start which died before its config was written would not have left."""
        ours = {"checkpoints", "history.jsonl", "environment.json", "data.json", "labels.json", f"step-{0:06d}.pt"}
        if not self.path.is_dir():
            return None
        found = list(self.path.iterdir())
        if self.checkpoints.is_dir():
            found += self.checkpoints.iterdir()
        else:
            ours = set()  # the checkpoints' folder is made first
        names = [entry.name for entry in found if entry.name.removeprefix(".").removesuffix(".tmp") not in ours]
        return min(names, default=None)

    def _numbered(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*.pt"))

    def _write_json(self, name: str, value: Any) -> None:
        write_whole(self.path / name, lambda where: where.write_text(json.dumps(value, indent=1) + "\n"))


def environment() -> dict[str, Any]:
    """Versions of everything that can change a run's numbers."""
    versions = {"torch": str(torch.__version__)}
    for name in ("dslify", "numpy", "lightning-fabric", "soundfile", "soxr", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions,
    }


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT and SIGTERM only raise a flag, which the yielded function reads; a second one interrupts.

    Outside the main thread, where signals cannot be caught, the flag is never raised.
    """
    asked = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if sys.stderr.isatty():
            print("Stopping after this step; a checkpoint is written. Once more stops at once.", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
