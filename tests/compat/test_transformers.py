"""`generate` on pygen's kernels: transformers' tokens by every way into it, and what is replaced and taken back."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface, GenerationMixin
from transformers.cache_utils import DynamicCache
from transformers.generation import TextStreamer
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers_cases import ARCHITECTURES, NEW, WINDOW, greedy, model, padded, prompts, run_with

from pygen.compat.transformers import Cache, PagedCache, convert, generation, patch
from pygen.compat.transformers.layers import FusedAttention, FusedRMSNorm
from pygen.compat.transformers.packed import PackedLinear
from pygen.compat.transformers.swapped import swapped

WAYS = ("patch", "convert", "parts", "paged")
MODES: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": lambda: {"input_ids": prompts()},
    "one": lambda: {"input_ids": prompts(1, 1)},
    "padded": lambda: padded(prompts()),
    "beam": lambda: {"input_ids": prompts(2), "num_beams": 3},
    "padded beam": lambda: {**padded(prompts()), "num_beams": 2},
    "beams returned": lambda: {"input_ids": prompts(1), "num_beams": 3, "num_return_sequences": 3},
    "lookup": lambda: {"input_ids": prompts(1).tile(1, 2), "prompt_lookup_num_tokens": 3},
    "repetition": lambda: {**padded(prompts()), "repetition_penalty": 1.5},
    "suppressed": lambda: {"input_ids": prompts(), "suppress_tokens": [3, 5, 7, 11, 13, 17, 19, 23]},
    "no repeats": lambda: {"input_ids": prompts(), "no_repeat_ngram_size": 2},
    "in chunks": lambda: {"input_ids": prompts(), "prefill_chunk_size": 5},
    "padded in chunks": lambda: {**padded(prompts()), "prefill_chunk_size": 5},
    "an end": lambda: {"input_ids": prompts(8), "eos_token_id": list(range(1, 20))},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tokens_are_transformers(name, way, mode):
    of = model(name)
    expected = greedy(of, **MODES[mode]())
    with run_with(way, of) as more:
        assert torch.equal(greedy(of, **MODES[mode](), **more()), expected)


@pytest.mark.parametrize("mode", ["greedy", "padded beam", "lookup", "padded in chunks"])
@pytest.mark.parametrize("way", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_attention_reads_the_cache(name, way, mode):
    of = model(name)
    expected = greedy(of, **MODES[mode]())
    with run_with(way, of) as more:
        assert torch.equal(greedy(of, **MODES[mode](), **more()), expected)


@pytest.mark.parametrize("way", ["patch", "convert"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tokens_are_a_static_caches(name, way):
    of = model(name)
    for inputs in ({"input_ids": prompts()}, padded(prompts())):
        expected = greedy(of, **inputs, cache_implementation="static")
        with run_with(way, of):
            assert torch.equal(greedy(of, **inputs, cache_implementation="static"), expected)


@pytest.mark.parametrize("way", ["patch", "convert"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tokens_with_an_assistant_are_those_without(name, way):
    of, assistant = model(name), model(name, seed=1)
    prompt = prompts(1)
    expected = greedy(of, input_ids=prompt)
    with run_with(way, of), run_with(way, assistant):
        for drafts in (of, assistant):  # most drafts are taken, or most are taken back
            assert torch.equal(greedy(of, input_ids=prompt, assistant_model=drafts), expected)


@settings(max_examples=12)
@given(
    name=st.sampled_from(ARCHITECTURES), way=st.sampled_from(("patch", "convert", "paged")), rows=st.integers(1, 4),
    length=st.integers(1, 40), new=st.integers(1, 30), beams=st.integers(1, 3), left=st.booleans(),
)  # fmt: skip
def test_the_tokens_of_any_batch_are_transformers(name, way, rows, length, new, beams, left):
    of = model(name)
    prompt = prompts(rows, length)
    inputs = padded(prompt) if left else {"input_ids": prompt}
    expected = greedy(of, **inputs, num_beams=beams, max_new_tokens=new)
    with run_with(way, of) as more:
        assert torch.equal(greedy(of, **inputs, num_beams=beams, max_new_tokens=new, **more()), expected)


@pytest.mark.parametrize("way", ["patch", "convert"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_tokens_are_transformers_up_to_rounding(name, way):
    """Where a token differs, transformers itself has the two within a rounding of its logits; and the logits are as
    near to float32 as transformers' own."""
    of, exact = model(name, torch.bfloat16), model(name)
    for inputs in ({"input_ids": prompts()}, padded(prompts())):
        options = {"return_dict_in_generate": True, "output_logits": True}
        expected = greedy(of, **inputs, **options)
        with run_with(way, of):
            actual = greedy(of, **inputs, **options)
        start = inputs["input_ids"].shape[1]
        for row in range(len(actual.sequences)):
            ours, theirs = actual.sequences[row, start:], expected.sequences[row, start:]
            apart = (ours != theirs).nonzero()
            if len(apart):
                step = int(apart[0])
                logits = expected.logits[step][row]
                assert float(logits[theirs[step]] - logits[ours[step]]) <= 0.05 * float(logits.abs().max())

    def forced(cache: Any) -> Tensor:
        parts = prompts(32, 24).split((18, 1, 1, 1, 3), 1)
        with torch.no_grad():
            return torch.cat([of(part, past_key_values=cache).logits.float() for part in parts], 1)

    with torch.no_grad():
        reference = exact(prompts(32, 24)).logits
    error = (forced(DynamicCache(config=of.config)) - reference).norm()
    with run_with(way, of):
        assert (forced(Cache(of.config)) - reference).norm() <= 1.1 * error


@pytest.mark.parametrize("way", ["patch", "convert", "parts", "paged"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cache_that_is_returned_goes_on(name, way):
    of = model(name)
    first = of.generate(prompts(2), max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, prompts(2, 4, seed=1)), 1)
    expected = greedy(of, input_ids=longer)
    with run_with(way, of) as more:
        options = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
        cache = of.generate(prompts(2), **options, **more()).past_key_values
        assert isinstance(cache, Cache | PagedCache)
        assert torch.equal(greedy(of, input_ids=longer, past_key_values=cache), expected)


@pytest.mark.parametrize("way", ["patch", "convert"])
def test_a_model_without_a_cache_and_a_training_step_are_transformers(way):
    of = copy.deepcopy(model("llama")).train()
    prompt = prompts()

    def step() -> list[Tensor]:
        loss = of(prompt, labels=prompt).loss
        return [loss, *torch.autograd.grad(loss, list(of.parameters()))]

    expected, tokens = step(), greedy(of.eval(), input_ids=prompt, use_cache=False)
    of.train()
    with run_with(way, of):
        for ours, theirs in zip(step(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert torch.equal(greedy(of.eval(), input_ids=prompt, use_cache=False), tokens)


def test_a_streamer_gets_each_token():
    class Tokens:
        def decode(self, tokens: Any, **_: Any) -> str:
            return " ".join(map(str, tokens)) + " "

    of, prompt = model("llama"), prompts(1)
    shown = []
    for context in (contextlib.nullcontext(), patch()):
        text = io.StringIO()
        with context, contextlib.redirect_stdout(text):
            greedy(of, input_ids=prompt, streamer=TextStreamer(Tokens()))  # type: ignore[arg-type]
        shown.append(text.getvalue())
    assert shown[0] == shown[1]


def test_patches_nest_and_leave_nothing():
    names = (
        generation.GENERATE, generation.PREPARE_CACHE, generation.SAMPLE, generation.BEAM_SEARCH,
        generation.ASSISTED_DECODING,
    )  # fmt: skip
    before = [vars(GenerationMixin)[name] for name in names] + [AttentionInterface._global_mapping["sdpa"]]
    of = model("llama")
    outer, inner = patch(), patch()
    outer.undo()
    assert all(vars(GenerationMixin)[name] is not original for name, original in zip(names, before, strict=False))
    for name, original in zip(names, before, strict=False):
        assert inspect.signature(vars(GenerationMixin)[name]) == inspect.signature(original)
    inner.undo()
    after = [vars(GenerationMixin)[name] for name in names] + [AttentionInterface._global_mapping["sdpa"]]
    assert all(ours is theirs for ours, theirs in zip(after, before, strict=True))
    assert "0 replaced" not in repr(inner)
    assert "(undone)" in repr(inner)
    result = of.generate(prompts(1), max_new_tokens=3, return_dict_in_generate=True)
    assert type(result.past_key_values) is DynamicCache


def test_a_converted_model_is_the_model_that_it_was():
    of = copy.deepcopy(model("llama"))
    cls, state, config, seen = type(of), of.state_dict(), of.config.to_dict(), []
    of.model.layers[1].self_attn.register_forward_hook(lambda *_: seen.append(1))
    expected = greedy(of, input_ids=prompts())
    hidden = of(prompts(), output_hidden_states=True).hidden_states
    handle = convert(of)
    assert isinstance(of, cls)
    assert type(of).__name__ == cls.__name__
    assert {entry.by.rpartition(".")[2]: entry.count for entry in handle.replaced} == {
        "FusedAttention": 2, "FusedRMSNorm": 5, "PackedLinear": 15, "attention": 1, "Generating": 1,
    }  # fmt: skip
    assert all(torch.equal(of.state_dict()[name], value) for name, value in state.items())
    again = convert(of)
    assert not again.replaced
    assert again.left[0].reason == "already a layer of pygen's"
    assert torch.equal(greedy(of, input_ids=prompts()), expected)
    for ours, theirs in zip(of(prompts(), output_hidden_states=True).hidden_states, hidden, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    seen.clear()
    greedy(of, input_ids=prompts())
    assert len(seen) == NEW
    again.undo()
    handle.undo()
    with convert(of, pack_weights=False) as handle:
        assert not any(isinstance(part, PackedLinear) for part in of.modules())
        assert torch.equal(greedy(of, input_ids=prompts()), expected)
    assert type(of) is cls
    assert of.config.to_dict() == config
    assert of.config._attn_implementation == "sdpa"
    assert not any(isinstance(part, FusedAttention | FusedRMSNorm) for part in of.modules())


def test_a_converted_model_is_copied_and_pickled():
    of = copy.deepcopy(model("llama"))
    expected = greedy(of, input_ids=prompts())
    with convert(of, pack_weights=True):
        greedy(of, input_ids=prompts())
        others = (copy.deepcopy(of), pickle.loads(pickle.dumps(of)))
    for other in others:
        assert isinstance(other, type(of))
        assert isinstance(other.model.layers[0].self_attn, FusedAttention)
        assert isinstance(other.model.norm, FusedRMSNorm)
        assert torch.equal(greedy(other, input_ids=prompts()), expected)


@pytest.mark.parametrize("width", [3, 32, 1000])
def test_a_norm_is_the_layers_in_float32_and_nearer_to_the_exact_in_other_dtypes(width):
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        norm, x = LlamaRMSNorm(width).to(dtype), (3 * torch.randn(64, width)).to(dtype)
        torch.nn.init.normal_(norm.weight)
        with torch.no_grad():
            theirs = norm(x)
            norm.__class__ = swapped(FusedRMSNorm, LlamaRMSNorm)
            ours, exact = norm(x), x.double()
            exact = exact * (exact.square().mean(1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()
        assert ours.dtype == dtype
        if dtype == torch.float32:
            assert torch.equal(ours, theirs)
        else:
            assert (ours - exact).norm() < (theirs - exact).norm()


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_norm_of_two_dtypes_is_the_layers(dtypes):
    x, norm = torch.randn(4, 8).to(dtypes[0]), LlamaRMSNorm(8).to(dtypes[1])
    expected = norm(x)
    norm.__class__ = swapped(FusedRMSNorm, LlamaRMSNorm)
    assert torch.equal(norm(x), expected)
    assert norm(x).dtype == expected.dtype


def test_what_is_not_known_is_left_and_named():
    of = copy.deepcopy(model("gpt2"))
    with convert(of) as handle:
        (left,) = handle.left
        assert left.places == ("transformer.h.0.attn", "transformer.h.1.attn")
        assert left.reason == "its attention is not that of Llama, Mistral, Qwen2 or Qwen3"
    of = copy.deepcopy(model("llama"))
    attention = of.model.layers[1].self_attn
    attention.forward = attention.forward

    class Own(type(of.model.norm)):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)  # type: ignore[no-any-return]

    of.model.norm.__class__ = Own
    expected = greedy(of, input_ids=prompts())
    with convert(of) as handle:
        assert handle.left[0].places == ("model.layers.1.self_attn",)
        assert handle.left[0].reason == "it has a forward of its own"
        assert type(of.model.norm) is Own
        assert torch.equal(greedy(of, input_ids=prompts()), expected)
    of.set_attn_implementation("eager")
    with convert(of) as handle:
        assert any("chosen by the user" in entry.reason for entry in handle.left)
        assert torch.equal(greedy(of, input_ids=prompts()), expected)
    with pytest.raises(TypeError, match=r"^model is a torch\.nn\.modules\.linear\.Linear, but expected a transformers"):
        convert(torch.nn.Linear(2, 2))


def test_caches_that_are_to_stay_stay():
    of = model("mistral")
    with patch():
        result = of.generate(prompts(1), max_new_tokens=2, return_dict_in_generate=True)
        assert type(result.past_key_values) is Cache
        assert result.past_key_values.layers[0].window == WINDOW
        mine = DynamicCache(config=of.config)
        result = of.generate(prompts(1), max_new_tokens=2, return_dict_in_generate=True, past_key_values=mine)
        assert result.past_key_values is mine
