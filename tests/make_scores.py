"""Makes `scores.npz`: what the switch of a fine-tuned speech codec says of real clips it has never seen, how far light
and full really are apart on them, and which recording each was cut from.

    python -m tests.make_scores FOLDER        # of clips at 16 kHz with a manifest.csv (path, split, label, source_id)

The light path is fitted to a third of the recordings of the training split, the switch to another third; the table
holds the last third and the other splits. It is what `test_guarantee.py` draws its real scores from.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch

import dslify
from dslify.observe import collect
from recipes.soundstream.model import CUT, pretrained

WIDTH, STEPS, SWITCH_STEPS, SECONDS = 0.24, 600, 400, 1


def clips(folder: Path) -> tuple[torch.Tensor, list[str], list[str]]:
    """(n, 1, samples) of one second each, their recordings, and their splits."""
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sound = [soundfile.read(folder / row["path"], dtype="float32") for row in rows]
    whole = [at for at, (wave, rate) in enumerate(sound) if len(wave) == SECONDS * rate]
    values = torch.stack([torch.from_numpy(sound[at][0])[None] for at in whole])
    return values, [rows[at]["source_id"] for at in whole], [rows[at]["split"] for at in whole]


def main(folder: Path) -> None:
    torch.manual_seed(0)
    codec = pretrained()
    net = dslify.insert(codec, CUT, WIDTH, (codec.example_input_array,), scope="encoder", projection=False, seed=0)
    values, sources, splits = clips(folder)
    turn = {source: at % 3 for at, source in enumerate(dict.fromkeys(sources))}
    parts = [turn[source] if split == "train" else 2 for source, split in zip(sources, splits, strict=True)]
    light, switch, rest = ([at for at, part in enumerate(parts) if part == wanted] for wanted in range(3))
    seen = dslify.open_data(values, sources=sources)
    dslify.finetune(
        net, seen.subset(light), switch_data=seen.subset(switch), steps=STEPS, switch_steps=SWITCH_STEPS, fit=False
    )
    found = collect(net, seen.subset(rest))
    names = np.unique(np.array(found.sources), return_inverse=True)[1]
    table = {"score": found.score.astype(np.float32), "difference": found.difference.astype(np.float32)}
    np.savez_compressed(Path(__file__).parent / "scores.npz", **table, source=names.astype(np.int32))
    print(f"{len(names)} clips of {names.max() + 1} recordings, mean difference {found.difference.mean():.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
