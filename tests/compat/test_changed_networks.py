"""Masked networks that somebody changed, before a drop-in came or after: the inverse is the library's in each case."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import normflows
import pytest
import torch
from nflows import transforms
from parity import assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pygen.compat.nflows
import pygen.compat.normflows
from pygen.compat import made

CONVERT = {"nflows": pygen.compat.nflows.convert, "normflows": pygen.compat.normflows.convert}
FEATURES = 4


def a_layer(library: str, **options: Any) -> Any:
    cls = transforms.MaskedAffineAutoregressiveTransform
    if library == "normflows":
        cls = normflows.flows.MaskedAffineAutoregressive
    layer = cls(FEATURES, 12, **options).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
    return layer


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def no_sweep(handle: Any) -> str:
    """Why the inverse of the one masked layer was left; empty where it was not."""
    return ", ".join(line.reason for line in handle.left if line.name.endswith(".inverse"))


class Doubled(nn.Module):
    """A block that nobody knows."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return 2 * x


def hook(network: Any) -> None:
    network.initial_layer.register_forward_hook(lambda part, inputs, output: output + 1)


def hook_before(network: Any) -> None:
    network.blocks[0].register_forward_pre_hook(lambda part, inputs: (inputs[0] + 1, *inputs[1:]))


def override(network: Any) -> None:
    network.final_layer.forward = lambda x: torch.ones_like(network.final_layer.bias).expand(len(x), -1)


def derive(network: Any) -> None:
    cls = type(network.blocks[0])
    derived = type("Loud", (cls,), {"forward": lambda self, *inputs: 2 * cls.forward(self, *inputs)})
    network.blocks[0].__class__ = derived


def derive_linear(network: Any) -> None:
    cls = type(network.initial_layer)
    network.initial_layer.__class__ = type("Loud", (cls,), {"forward": lambda self, x: 2 * cls.forward(self, x)})


def derive_activation(network: Any) -> None:
    class Loud(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    network.blocks[1].activation = Loud()


def replace_block(network: Any) -> None:
    network.blocks[0] = Doubled()


def replace_layer(network: Any) -> None:
    network.blocks[0].linear_layers[1] = Doubled()


def replace_dropout(network: Any) -> None:
    network.blocks[0].dropout = Doubled()


def weigh_in_hooks(network: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        torch.nn.utils.weight_norm(network.final_layer)
    network.final_layer.weight_g.data.mul_(3)


def prune(network: Any) -> None:
    from torch.nn.utils import prune

    prune.random_unstructured(network.initial_layer, "weight", 0.5)
    network.initial_layer.weight_orig.data.mul_(2)


CHANGES = (hook, hook_before, override, derive, derive_linear, derive_activation, replace_block, replace_layer,
           replace_dropout, weigh_in_hooks, prune)  # fmt: skip


@pytest.mark.parametrize("library", CONVERT)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_is_left_and_named(library: str, change: Callable[[Any], None]) -> None:
    layer = a_layer(library)
    change(layer.autoregressive_net)
    y = randn(5, FEATURES)
    expected = list(layer.inverse(y))
    with CONVERT[library](layer) as handle:
        assert no_sweep(handle).startswith("its ")
        assert_same(list(layer.inverse(y)), expected)


@pytest.mark.parametrize("library", CONVERT)
@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_is_changed_later_is_not_swept(library: str, change: Callable[[Any], None]) -> None:
    layer, plain = (copy.deepcopy(same) for same in [a_layer(library)] * 2)
    y = randn(5, FEATURES)
    with torch.no_grad(), CONVERT[library](layer) as handle:
        assert not no_sweep(handle)
        layer.inverse(y)
        for each in (layer, plain):
            torch.manual_seed(0)
            change(each.autoregressive_net)
        assert_same(list(layer.inverse(y)), list(plain.inverse(y)))


@pytest.mark.parametrize("library", CONVERT)
def test_the_reason_names_the_part(library: str) -> None:
    layer = a_layer(library)
    replace_block(layer.autoregressive_net)
    with CONVERT[library](layer) as handle:
        assert no_sweep(handle) == "its network has a Doubled in the place of a MaskedResidualBlock"
    hook(layer.autoregressive_net)
    with CONVERT[library](layer) as handle:
        assert no_sweep(handle) == "its network has hooks or a forward of its own"


@pytest.mark.parametrize("library", CONVERT)
def test_an_activation_in_place_of_a_residual_block_is_left(library: str) -> None:
    """It changes what the block adds to; after a batch normalization it does not."""
    y = randn(5, FEATURES)
    for norm in (False, True):
        layer = a_layer(library, activation=nn.ReLU(inplace=True), use_batch_norm=norm)
        with torch.no_grad():
            expected = list(layer.inverse(y))
            with CONVERT[library](layer) as handle:
                assert ("in place" in no_sweep(handle)) is not norm
                assert_same(list(layer.inverse(y)), expected)


@pytest.mark.parametrize("library", CONVERT)
def test_a_batch_normalization_without_statistics_is_left(library: str) -> None:
    layer = a_layer(library, use_batch_norm=True)
    layer.autoregressive_net.blocks[0].batch_norm_layers[0] = nn.BatchNorm1d(12, track_running_stats=False).double()
    y = randn(5, FEATURES)
    expected = list(layer.inverse(y))
    with CONVERT[library](layer) as handle:
        assert "no running statistics" in no_sweep(handle)
        assert_same(list(layer.inverse(y)), expected)


@pytest.mark.parametrize("library", CONVERT)
def test_parametrized_weights_are_swept_as_they_are(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = a_layer(library)
    network = layer.autoregressive_net
    parametrizations.weight_norm(network.final_layer)
    parametrizations.weight_norm(network.blocks[0].linear_layers[0])
    y = randn(5, FEATURES)
    weights = network.final_layer.parametrizations.weight
    swept = _counted(monkeypatch)
    for factor in (1.0, 3.0):
        weights.original0.data.mul_(factor)
        plain = copy.deepcopy(layer)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                expected = list(plain.inverse(y))
                with CONVERT[library](layer) as handle:
                    assert not no_sweep(handle)
                    assert_same(list(layer.inverse(y)), expected)
    assert len(swept) == 4


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Counts the sweeps."""
    calls: list[Any] = []
    sweep = made.masked_inverse

    def counted(*inputs: Any, **options: Any) -> Any:
        calls.append(inputs)
        return sweep(*inputs, **options)

    monkeypatch.setattr(made, "masked_inverse", counted)
    return calls


@pytest.mark.parametrize("library", CONVERT)
@pytest.mark.parametrize("residual", [True, False])
def test_each_tensor_may_be_written_to_through_data(library: str, residual: bool) -> None:
    """Which moves no version: every weight, bias and statistic is looked at."""
    layer = a_layer(library, use_batch_norm=True, use_residual_blocks=residual)
    plain = copy.deepcopy(layer)
    y = randn(5, FEATURES)
    names = [name for name, value in layer.state_dict().items() if value.is_floating_point() and "mask" not in name]
    assert len(names) > 10
    with torch.no_grad(), CONVERT[library](layer) as handle:
        assert not no_sweep(handle)
        for name in names:
            before = layer.inverse(y)[0]
            for each in (layer, plain):
                each.state_dict()[name].data.mul_(1.5).add_(0.1)
            after = layer.inverse(y)
            assert not torch.equal(after[0], before), name
            assert_same(list(after), list(plain.inverse(y)))


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("library", CONVERT)
def test_shapes_of_contexts(library: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library broadcasts is broadcast, and what it raises on is its own error."""
    layer = a_layer(library, context_features=3, num_blocks=blocks)
    plain = copy.deepcopy(layer)
    swept = _counted(monkeypatch)
    with torch.no_grad(), CONVERT[library](layer):
        for rows, context in (
            (5, randn(5, 3)), (5, randn(1, 3)), (1, randn(1, 3)), (5, randn(3)), (5, randn(4, 3)), (1, randn(5, 3)),
            (5, randn(5, 2)), (5, None), (5, randn(5, 1, 3)),
        ):  # fmt: skip
            y = randn(rows, FEATURES)
            try:
                expected = list(plain.inverse(y, context))
            except Exception as theirs:
                with pytest.raises(type(theirs)):
                    layer.inverse(y, context)
            else:
                assert_same(list(layer.inverse(y, context)), expected)
    # The context of one row for all is swept where the library has it.
    assert len(swept) == (4 if library == "nflows" else 3)


@pytest.mark.parametrize("library", CONVERT)
@pytest.mark.parametrize("shape", [(5, FEATURES + 1), (FEATURES + 1,), (5, 1), (2, 5, FEATURES + 1)])
def test_a_wrong_number_of_features_is_the_librarys_error(library: str, shape: tuple[int, ...]) -> None:
    layer = a_layer(library)
    for y in (randn(*shape), torch.zeros(5, FEATURES, dtype=torch.int64)):
        with pytest.raises(Exception) as theirs:
            layer.inverse(y)
        with CONVERT[library](layer), pytest.raises(theirs.type):
            layer.inverse(y)
        assert theirs.type is not ValueError
