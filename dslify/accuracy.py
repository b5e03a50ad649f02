"""Accuracy of a classifier: is the largest logit that of the sample's label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .errors import DataError, OptionError
from .probe import Judge
from .samples import Samples


def accuracy_of(samples: Samples, classes: Sequence[str] = ()) -> Judge:
    """1 where the largest logit of the network's first output, (batch, classes), is that of the sample's label, else 0.

    samples: with labels. classes: the labels in the order of the logits; where not given the samples' own, which are
    sorted names or class indices (samples.class_order).
    Raises DataError for labels that are missing or unknown, and when called for names whose number is not that of the
    logits, because then their order is not certain; OptionError for an output that is no logits.
    """
    order = tuple(classes) or samples.classes
    targets = samples.class_indices(order)
    numbered = order == tuple(map(str, range(len(order))))

    def right(output: Any, _: Any, positions: Sequence[int]) -> Tensor:
        logits = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if logits is None or logits.dim() != 2 or len(logits) != len(positions) or not logits.is_floating_point():
            found = "no tensor" if logits is None else f"{logits.dtype} of shape {tuple(logits.shape)}"
            raise OptionError(
                f"Accuracy needs logits of shape ({len(positions)}, classes) as the network's first output for "
                f"{len(positions)} samples; got {found}."
            )
        outputs = logits.shape[1]
        if len(order) > outputs or (len(order) < outputs and not numbered):
            raise DataError(
                f"The data has {len(order)} labels and the network {outputs} classes, so it is not certain which label "
                "is which class; label the samples with class indices (0, 1, ...), or use data that has every class."
            )
        return logits.argmax(1).cpu() == targets[torch.as_tensor(positions)]

    return right
