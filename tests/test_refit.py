"""The least-squares start of a light path in finetune(), on a network as it is and on one from a file."""

import pytest
import torch

import dslify
from tests.zoo import ZOO

STEPS = 2


def sound(rows=24, seed=0, length=512):
    return torch.randn(rows, 1, length, generator=torch.Generator().manual_seed(seed))


def inserted(**options):
    return dslify.insert(ZOO["autoencoder"].build(), "encoder.block2", 0.3, (sound(1),), **options)


def first_loss(net, data=None, **options):
    history = dslify.finetune(
        net, sound() if data is None else data, steps=STEPS, switch_steps=0, progress=False, **options
    )
    return history.phases[0].first("light"), history.fitted


@pytest.mark.parametrize("where", ["in memory", "from a file"])
@pytest.mark.parametrize("depth", [1.0])
def test_a_fitted_light_path_starts_lower(where, depth, tmp_path):
    plain, fitted = inserted(depth=depth), inserted(depth=depth)
    if where == "from a file":
        dslify.save(fitted, tmp_path / "net.dsl")
        fitted = dslify.load(tmp_path / "net.dsl")
    without, said = first_loss(plain, fit=False)
    assert not said
    with_fit, said = first_loss(fitted)
    assert said
    assert with_fit < 0.8 * without


def test_a_light_path_without_branches_is_fitted_to_the_whole_full_path():
    data = sound(length=1280)
    net = dslify.insert(ZOO["codec"].build(), ZOO["codec"].at, 0.2, (data[:1],), scope="encoder", depth=0.5)
    (layer,) = dslify.dsl_layers(net)
    assert layer.plan.dropped
    scoped = net.encoder
    _, said = first_loss(scoped, data)
    assert said


def test_what_was_trained_is_not_fitted_again():
    net = inserted()
    assert first_loss(net)[1]
    before = {name: value.clone() for name, value in dslify.dsl_layers(net)[0].light.state_dict().items()}
    history = dslify.finetune(net, sound(seed=1), steps=1, switch_steps=0, lr=1e-12, progress=False)
    assert not history.fitted
    for name, value in dslify.dsl_layers(net)[0].light.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-9)


def test_both_layers_of_a_nested_network_are_fitted():
    net = dslify.insert(inserted(), "encoder.block4", 0.3, (sound(1),))
    before = [
        {name: value.clone() for name, value in layer.light.state_dict().items()} for layer in dslify.dsl_layers(net)
    ]
    assert first_loss(net)[1]
    for layer, old in zip(dslify.dsl_layers(net), before, strict=True):
        moved = [(value - old[name]).abs().max().item() for name, value in layer.light.state_dict().items()]
        assert max(moved) > 0.05, "two steps of training alone move weights by less"
