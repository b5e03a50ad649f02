"""Two cuts in one network, in either order, nested or one after the other; from a file as well."""

import pytest
import torch

import dslify
from dslify.errors import CutError, OptionError
from tests.zoo import ZOO

EXACT = 1e-6
CUTS = {
    "autoencoder": ("encoder.block2", "encoder.block4"),
    "vit": ("blocks.0", "blocks.2"),
    "tied": ("first", "qkv"),
    "unet": ("down1", "middle"),
}


@pytest.fixture(scope="module", params=CUTS)
def case(request):
    network = ZOO[request.param]
    model = network.build()
    x = network.batch(2)
    with torch.no_grad():
        return model, x, model(x), CUTS[request.param]


def leaves(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def same(mine, theirs):
    return all(
        torch.allclose(a, b, rtol=0, atol=EXACT * b.abs().max().item())
        for a, b in zip(leaves(mine), leaves(theirs), strict=True)
    )


def check(net, x, expected):
    layers = dslify.dsl_layers(net)
    assert len(layers) == 2
    with torch.no_grad():
        with dslify.route(net, "full"):
            assert same(net(x), expected)
        for layer in layers:
            layer.threshold.fill_(float("inf"))
            found = net(x)
            assert all(leaf.isfinite().all() for leaf in leaves(found))
            assert not same(found, expected), "the light path of one layer alone changes the answer"
            layer.threshold.fill_(0.0)
        assert same(net(x), expected)
    removed = dslify.remove(net)
    assert not dslify.dsl_layers(removed)
    with torch.no_grad():
        assert same(removed(x), expected)


@pytest.mark.parametrize("order", ["outer first", "inner first"])
def test_a_second_layer(case, order):
    model, x, expected, cuts = case
    first, second = cuts if order == "outer first" else cuts[::-1]
    one = dslify.insert(model, first, 0.25, (x,))
    two = dslify.insert(one, second, 0.25, (x,))
    assert len(dslify.dsl_layers(one)) == 1, "the given network is left untouched"
    check(two, x, expected)


def test_a_second_layer_of_a_network_from_a_file(case, tmp_path):
    model, x, expected, (first, second) = case
    dslify.save(dslify.insert(model, first, 0.25, (x,)), tmp_path / "one.dsl")
    two = dslify.insert(dslify.load(tmp_path / "one.dsl"), second, 0.25, (x,))
    dslify.save(two, tmp_path / "two.dsl")
    check(dslify.load(tmp_path / "two.dsl"), x, expected)


def test_one_layer_after_the_other():
    network = ZOO["autoencoder"]
    model, x = network.build(), network.batch(2)
    one = dslify.insert(model, "encoder.block2", 0.25, (x,), to="encoder.block4")
    two = dslify.insert(one, "decoder.block1", 0.25, (x,))
    with torch.no_grad():
        check(two, x, model(x))


def test_costs_of_both_layers_are_told():
    network = ZOO["autoencoder"]
    net = dslify.insert(network.build(), "encoder.block2", 0.25, (network.batch(1),))
    net = dslify.insert(net, "encoder.block4", 0.25, (network.batch(1),))
    outer, inner = dslify.dsl_layers(net)
    assert outer.plan.macs["full"] > inner.plan.macs["full"] > inner.plan.macs["light"] > 0


def test_what_cannot_be_cut_again_is_told():
    network = ZOO["codec"]
    model, x = network.build(), network.batch(1)
    net = dslify.insert(model, network.at, 0.25, (x,), scope="encoder")
    with pytest.raises(OptionError, match="--scope encoder"):
        dslify.insert(net, "encoder.block3", 0.25, (x,))
    with pytest.raises(CutError, match="no such module in this network"):
        dslify.insert(net, "block99", 0.25, (x,), scope="encoder")
    again = dslify.insert(net, "encoder.block3", 0.25, (x,), scope="encoder")
    assert len(dslify.dsl_layers(again)) == 2
