"""Every row of the table is run by an oracle."""

import pytest
import torch

from dslify.rules import RULES
from tests import (
    test_rule_oracles,
    test_rule_oracles_indexing,
    test_rule_oracles_layers,
    test_rule_oracles_views,
    test_rules,
)
from tests.oracles import region_of

ROOMS = (
    test_rules, test_rule_oracles, test_rule_oracles_indexing, test_rule_oracles_layers, test_rule_oracles_views,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_every_row_is_run():
    seen = set()
    for room in ROOMS:
        for make in room.CASES.values():
            seen |= region_of(make).overloads
    assert not RULES.keys() - seen


def test_every_row_names_an_operator():
    for name in RULES:
        namespace, packet, overload = name.split(".")
        if namespace == "aten":
            assert hasattr(getattr(torch.ops.aten, packet), overload), name
