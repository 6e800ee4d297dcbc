"""Packed weights while `generate` runs: transformers' tokens, whatever becomes of the weights; and nothing is left."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils import _pytree as pytree
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers_cases import ARCHITECTURES, greedy, model, padded, prompts, run_with

from pygen.compat.transformers import convert, generation, packed, patch
from pygen.compat.transformers.packed import PackedLinear

MODES: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": lambda: {"input_ids": prompts()},
    "padded beam": lambda: {**padded(prompts()), "num_beams": 2},
    "lookup": lambda: {"input_ids": prompts(1).tile(1, 2), "prompt_lookup_num_tokens": 3},
}


def _linear(of: Any) -> list[Any]:
    return [part for part in of.modules() if isinstance(part, nn.Linear)]


def _is_as_it_was(of: Any) -> bool:
    """Whether nothing of pygen's is in a model that is not converted."""
    plain = all(type(part) is nn.Linear for part in _linear(of))
    return plain and not any("pygen" in key for part in of.modules() for key in vars(part))


@pytest.mark.parametrize("mode", ["greedy", "padded beam", "lookup"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_weights_give_the_tokens_and_follow_the_weights(name, mode):
    of = copy.deepcopy(model(name))
    inputs = MODES[mode]()
    with convert(of, pack_weights=True) as handle:
        layers = [part for part in of.modules() if isinstance(part, PackedLinear)]
        assert len(layers) == sum(entry.count for entry in handle.replaced if entry.by.endswith("PackedLinear")) > 0
        assert torch.equal(greedy(of, **inputs), greedy(model(name), **inputs))
        with torch.no_grad():
            layers[0].weight.mul_(1.1)
            layers[-1].weight.data.mul_(-1)  # which moves no version
        changed = copy.deepcopy(of)
        assert torch.equal(greedy(of, **inputs), greedy(changed, **inputs))
    assert torch.equal(greedy(of, **inputs), greedy(changed, **inputs))
    assert not any("pygen" in key for part in of.modules() for key in vars(part))
    of.bfloat16()
    with convert(of, pack_weights=True):  # is for float32
        assert not any(isinstance(part, PackedLinear) for part in of.modules())


@pytest.mark.parametrize("mode", ["greedy", "padded beam", "lookup"])
def test_inside_patch_weights_are_packed_while_a_model_generates(mode, monkeypatch):
    of = copy.deepcopy(model("llama"))
    inputs, linear = MODES[mode](), [part for part in of.modules() if type(part) is nn.Linear]
    expected, packed, reordered = greedy(of, **inputs), [], torch.ops.mkldnn._reorder_linear_weight
    of.lm_head.register_forward_hook(lambda *_: packed.append(all(isinstance(one, PackedLinear) for one in linear)))
    monkeypatch.setattr(
        "pygen.compat.transformers.packed._pack", lambda w: made.append(1) or reordered(w.detach(), None)
    )
    for _ in range(2):
        made = []
        with patch():
            for times in range(1, 3):
                assert torch.equal(greedy(of, **inputs), expected)
                assert len(made) == len(linear) * times  # which the weights' change, but no second call, repeats
                assert all(type(one) is nn.Linear for one in linear)
                assert not any("pygen" in key for part in of.modules() for key in vars(part))
                assert torch.equal(greedy(of, **inputs), expected)
                with torch.no_grad():
                    for one in linear:
                        one.weight.mul_(1)
    assert packed
    assert all(packed)
    packed.clear()
    greedy(of, **inputs)
    assert not any(packed)


def test_a_model_of_more_than_a_gibibyte_is_not_packed_unasked(monkeypatch):
    monkeypatch.setattr("pygen.compat.transformers.packed.BY_DEFAULT", 1000)
    of, packed = copy.deepcopy(model("llama")), []
    of.lm_head.register_forward_hook(lambda layer, *_: packed.append(isinstance(layer, PackedLinear)))
    with patch():
        greedy(of, input_ids=prompts())
    with convert(of):
        greedy(of, input_ids=prompts())
    assert packed
    assert not any(packed)


def test_a_packed_layer_trains():
    of = copy.deepcopy(model("llama"))
    with convert(of, pack_weights=True):
        greedy(of, input_ids=prompts())
        of(prompts(), labels=prompts()).loss.backward()
    assert all(weight.grad is not None for weight in of.parameters())


WAYS = ["patch", "convert"]


@pytest.mark.parametrize("change", ["a row", "its rows", "its columns", "an element"])
@pytest.mark.parametrize("way", WAYS)
def test_any_write_past_the_version_is_seen_the_next_time(way, change):
    of, inputs = copy.deepcopy(model("llama")), MODES["greedy"]()
    layer = of.model.layers[0].mlp.up_proj
    with run_with(way, of):
        before = greedy(of, **inputs)
        if change == "a row":
            for row in range(0, 48, 5):
                layer.weight.data[row] *= -50
        elif change == "its rows":
            layer.weight.data = layer.weight.data.flip(0)
        elif change == "its columns":
            layer.weight.data.copy_(layer.weight.data.flip(1))
        else:
            layer.weight.data[7, 11] = 1e4
        after = greedy(of, **inputs)
    assert torch.equal(after, greedy(of, **inputs))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("shape", [(3, 5), (4, 6), (5, 1), (0, 4)])
def test_a_change_of_any_element_changes_the_sums(shape):
    weight = torch.randn(shape)
    sums = packed._sums(weight)
    assert sums == packed._sums(weight.clone())
    for i in range(weight.numel()):
        changed = weight.clone()
        changed.view(-1)[i] = torch.nextafter(changed.view(-1)[i], torch.tensor(9.0))
        assert packed._sums(changed) != sums
    assert packed._sums(weight.t().contiguous().t()) is not None  # of any layout
    assert packed._sums(torch.randn(13)[1:].view(3, 4)) is not None


def _weight_norm(layer: nn.Module) -> Tensor:
    torch.nn.utils.weight_norm(layer)
    return layer.weight_g  # type: ignore[return-value]


def _spectral_norm(layer: nn.Module) -> Tensor:
    torch.nn.utils.spectral_norm(layer)
    return layer.weight_orig  # type: ignore[return-value]


def _pruned(layer: nn.Module) -> Tensor:
    prune.random_unstructured(layer, "weight", 0.3)
    return layer.weight_mask  # type: ignore[return-value]


def _parametrized(layer: nn.Module) -> Tensor:
    parametrizations.weight_norm(layer)
    return layer.parametrizations.weight.original0  # type: ignore[return-value, union-attr]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", [_weight_norm, _spectral_norm, _pruned, _parametrized])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*was changed again after pygen")
def test_weights_that_are_made_before_each_call_are_followed(way, hook, first):
    """Hooked before pygen comes, or after."""
    of, inputs = copy.deepcopy(model("llama")), MODES["greedy"]()
    made_of = hook(of.lm_head) if first else None
    of.eval()
    with run_with(way, of):
        before = greedy(of, **inputs)
        if made_of is None:
            made_of = hook(of.lm_head)
        with torch.no_grad():
            made_of.copy_(torch.rand(made_of.shape, generator=torch.Generator().manual_seed(1)).round(decimals=1))
        after = greedy(of, **inputs)
        if hook is not _spectral_norm:  # which has a tensor that PyTorch does not copy
            assert torch.equal(greedy(copy.deepcopy(of), **inputs), after)
    assert torch.equal(after, greedy(of, **inputs))
    assert not torch.equal(after, before)


class _AtTheFifth(LogitsProcessor):
    def __init__(self, change: Callable[[], Any]) -> None:
        self.change = change

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == prompts().shape[1] + 5:
            self.change()
        return scores


@pytest.mark.parametrize("change", ["written", "replaced", "given data", "by a hook"])
@pytest.mark.parametrize("way", ["", *WAYS])
def test_a_weight_that_changes_inside_a_generate_is_followed(way, change):
    def tokens(way: str) -> Tensor:
        of = copy.deepcopy(model("llama"))
        weight = of.lm_head.weight

        def after() -> None:
            if change == "written":
                with torch.no_grad():
                    weight.mul_(-1)
            elif change == "replaced":
                of.lm_head.weight = nn.Parameter(weight.detach().flip(0))
            elif change == "given data":
                weight.data = weight.data.flip(0)

        def turn(*_: Any) -> None:
            weight.data.copy_(weight.data.roll(1, 0))

        if change == "by a hook":
            of.lm_head.register_forward_pre_hook(turn)
        options = {"logits_processor": LogitsProcessorList([_AtTheFifth(after)])}
        if not way:
            return greedy(of, **MODES["greedy"](), **options)  # type: ignore[no-any-return]
        with run_with(way, of):
            return greedy(of, **MODES["greedy"](), **options)  # type: ignore[no-any-return]

    if way:
        assert torch.equal(tokens(way), tokens(""))
    else:
        assert not torch.equal(tokens(way), greedy(model("llama"), **MODES["greedy"]()))


class _Codes(Tensor):
    """A weight of another library's: codes and scales in the form of a float32 tensor."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        made.scale = weight.abs().amax(1, keepdim=True) / 127
        made.codes = (weight / made.scale).round().to(torch.int8)
        return made

    def __init__(self, weight: Tensor) -> None: ...

    def decoded(self) -> Any:
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function is torch.ops.aten.detach.default:
            return _Codes(args[0].decoded())
        if function is torch.ops.aten.view.default:
            raise NotImplementedError("a view of codes")
        args, kwargs = pytree.tree_map_only(_Codes, _Codes.decoded, (args, kwargs or {}))
        return function(*args, **kwargs)


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_other_libraries_are_left_to_them(way):
    of = copy.deepcopy(model("llama"))
    of.lm_head.weight = nn.Parameter(_Codes(of.lm_head.weight.detach()), requires_grad=False)
    assert type(of.lm_head.weight) is _Codes
    assert not packed.can_pack(of.lm_head)
    assert packed.can_pack(of.model.layers[0].mlp.up_proj)
    expected = greedy(of, **MODES["greedy"]())
    with run_with(way, of):
        assert torch.equal(greedy(of, **MODES["greedy"]()), expected)


def test_a_copy_that_is_made_while_a_model_generates_is_an_ordinary_one():
    of, inputs, made = copy.deepcopy(model("llama")), MODES["greedy"](), []

    class Copies(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
            if not made:
                made.extend([copy.deepcopy(of), pickle.dumps(of)])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with patch():
        expected = greedy(of, **inputs, stopping_criteria=StoppingCriteriaList([Copies()]))
    copied, saved = made
    assert b"pygen" not in saved
    for other in (copied, pickle.loads(saved)):
        assert _is_as_it_was(other)
        assert torch.equal(greedy(other, **inputs), expected)


def test_threads_that_generate_with_one_model_leave_nothing(monkeypatch):
    """One ends while another is about to pack."""
    of, inputs, errors = copy.deepcopy(model("llama")), MODES["greedy"](), []
    expected = greedy(of, **inputs)
    inside, over = threading.Event(), threading.Event()
    pack = packed._pack

    def slow(weight: Tensor) -> Tensor:
        if threading.current_thread().name == "slow":
            inside.set()
            over.wait(20)
        return pack(weight)

    monkeypatch.setattr(packed, "_pack", slow)

    def run() -> None:
        try:
            assert torch.equal(greedy(of, **inputs), expected)
        except BaseException as error:
            errors.append(error)

    with patch():
        late = threading.Thread(target=run, name="slow")
        late.start()
        inside.wait(20)
        run()
        over.set()
        late.join()
        assert not errors
        assert _is_as_it_was(of)
        assert not packed._lent
        assert not packed._in_use
        copy.deepcopy(of)


@pytest.mark.parametrize("way", WAYS)
def test_packed_weights_go_with_what_they_were_made_of(way):
    of, inputs = copy.deepcopy(model("llama")), MODES["greedy"]()
    old = weakref.ref(of.lm_head.weight.untyped_storage())

    def packs() -> int:
        return sum(1 for one in gc.get_objects() if type(one) is Tensor and one.is_mkldnn)

    gc.collect()
    before = packs()
    with run_with(way, of):
        greedy(of, **inputs)
        assert packs() == before + len(_linear(of))
        of.bfloat16()
        greedy(of, **inputs)
        gc.collect()
        assert packs() == before
        assert old() is None
        of.float()
        greedy(of, **inputs)
        assert packs() == before + len(_linear(of))
    gc.collect()
    assert packs() == before
    assert not len(generation.packs)
