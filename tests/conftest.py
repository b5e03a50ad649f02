import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the workers share two cores

import pytest
import torch
from hypothesis import settings

import dslify
from tests.zoo import ZOO

torch.set_num_threads(1)
# the same examples in every run; HYPOTHESIS_PROFILE=default looks for others
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


class Inserted:
    """A network of the zoo and its dslified forms, built once per test process."""

    def __init__(self, name: str):
        self.network = ZOO[name]
        self.original = self.network.build()
        self._nets: dict[float, torch.nn.Module] = {}

    def net(self, width: float) -> torch.nn.Module:
        if width not in self._nets:
            self._nets[width] = dslify.insert(
                self.original, self.network.at, width, (self.network.batch(1),), scope=self.network.scope
            )
        return self._nets[width]


_built: dict[str, Inserted] = {}


@pytest.fixture(params=list(ZOO))
def inserted(request: pytest.FixtureRequest) -> Inserted:
    return _built.setdefault(request.param, Inserted(request.param))
