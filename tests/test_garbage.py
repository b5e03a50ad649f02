"""Python's collector comes back as it was."""

import gc
from contextlib import suppress

import torch
from torch import nn

import dslify
from dslify.garbage import seldom_collected


def test_thresholds_are_raised_within_the_block_and_restored_after_an_error() -> None:
    before = gc.get_threshold()
    with suppress(ZeroDivisionError), seldom_collected():
        assert gc.get_threshold()[0] > before[0]
        raise ZeroDivisionError
    assert gc.get_threshold() == before


def test_a_user_who_collects_less_often_is_not_made_to_collect_more() -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(10_000_000, 7, 7)
        with seldom_collected():
            assert gc.get_threshold() == (10_000_000, 7, 7)
        gc.set_threshold(0)  # never
        with seldom_collected():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


def test_insert_leaves_the_collector_as_it_was() -> None:
    before = gc.get_threshold()
    dslify.insert(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "0", 0.5, (torch.zeros(1, 8),))
    assert gc.get_threshold() == before
