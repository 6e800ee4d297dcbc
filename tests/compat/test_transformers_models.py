"""`generate` of models whose attention is unlike Llama's: their own tokens, by `patch` and by `convert`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers_cases import (
    UNLIKE_LLAMA,
    WINDOW,
    choose,
    greedy,
    model,
    of_pictures,
    padded,
    prompts,
    run_with,
    unlike_llama,
)

from pygen.compat.transformers import Cache, PagedCache, convert, patch
from pygen.compat.transformers.attention import attention
from pygen.compat.transformers.held import HeldLayer

MODES: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": lambda: {"input_ids": prompts()},
    "short": lambda: {"input_ids": prompts(2, 12)},
    "padded": lambda: padded(prompts()),
    "padded beam": lambda: {**padded(prompts()), "num_beams": 2},
    "lookup": lambda: {"input_ids": prompts(1).tile(1, 2), "prompt_lookup_num_tokens": 3},
    "in chunks": lambda: {"input_ids": prompts(), "prefill_chunk_size": 11},
}
UNPAGED = ("earlier layers", "cache alone", "index")  # kinds of layers that no page is for


def _serves(name: str, mode: str, way: str) -> bool:
    plain = "index" not in name or mode != "in chunks"  # which transformers itself does not do
    return plain and not (way == "paged" and any(part in name for part in UNPAGED))


@pytest.mark.parametrize(
    ("name", "mode", "way"),
    [
        (name, mode, way) for name in UNLIKE_LLAMA for mode in MODES for way in ("patch", "convert", "paged")
        if _serves(name, mode, way)
    ],
)  # fmt: skip
def test_the_tokens_are_transformers(name, mode, way):
    of = unlike_llama(name)
    expected = greedy(of, **MODES[mode]())
    assert expected.unique().numel() > 20
    if way == "paged":
        pages = PagedCache(of.config, pages=400, page_size=4)
        with patch():
            assert torch.equal(greedy(of, **MODES[mode](), past_key_values=pages), expected)
        return
    with run_with(way, of):
        assert of.config._attn_implementation == "sdpa"
        assert torch.equal(greedy(of, **MODES[mode]()), expected)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("way", ["patch", "convert"])
def test_layers_that_attend_to_a_picture_have_transformers_tokens(way, beams):
    of, inputs = of_pictures()
    expected = greedy(of, **inputs, num_beams=beams)
    with run_with(way, of):
        assert torch.equal(greedy(of, **inputs, num_beams=beams), expected)
    with pytest.raises(ValueError, match="^config has layers of cross-attention, but expected full or sliding"):
        PagedCache(of.config, pages=40)


def test_what_converting_did_to_attention_is_said_and_taken_back():
    functions = AttentionInterface._global_mapping
    before = functions["sdpa"]
    for name, replaced in (("its own call of PyTorch", False), ("keys chosen by an index", True)):
        of = unlike_llama(name)
        with convert(of) as handle:
            named = [entry for entry in handle.replaced if entry.name == "attention 'sdpa'"]
            assert len(named) == replaced
            left = [entry.reason for entry in handle.left if entry.name == "attention 'sdpa'"]
            assert left == ([] if replaced else ["it cannot be chosen, and reads the keys that pygen's cache holds"])
            assert functions["sdpa"] is not before
        assert functions["sdpa"] is before
    of = model("llama")
    first, second = convert(of), patch()
    first.undo()
    assert functions["sdpa"] is not before
    third = convert(of)
    second.undo()
    assert functions["sdpa"] is not before
    assert any(entry.name == "attention 'sdpa'" for entry in third.replaced)
    third.undo()
    assert functions["sdpa"] is before


def test_somebody_elses_attention_keeps_what_no_cache_of_pygens_holds():
    functions, of = AttentionInterface._global_mapping, model("gpt2")
    before, seen = functions["sdpa"], []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return before(*args, **kwargs)

    functions["sdpa"] = theirs
    try:
        with convert(of):
            greedy(of, input_ids=prompts(), use_cache=False, max_new_tokens=2)
            assert len(seen) == 4
            greedy(of, input_ids=prompts(), max_new_tokens=3)
            assert len(seen) <= 6
        assert functions["sdpa"] is theirs
    finally:
        functions["sdpa"] = before


@pytest.mark.parametrize("name", ["indices", "block_indices", "s_aux"])
def test_arguments_that_change_the_scores_are_not_passed_over(name):
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f'^{name} was given to attention "pygen", but expected None'):
        attention(nn.Module(), x, x, x, None, **{name: torch.zeros(1)})
    of = unlike_llama("keys chosen by an index")
    with choose(of, "pygen"), pytest.raises(ValueError, match="^indices was given"):
        greedy(of, input_ids=prompts())


def test_a_window_that_no_mask_has_is_transformers_own():
    of = unlike_llama("a window in its cache alone")
    assert {type(layer) for layer in Cache(of.config).layers} == {DynamicSlidingWindowLayer}
    with pytest.raises(ValueError, match="^config has layers of sliding_attention without a mask"):
        PagedCache(of.config, pages=40)


@pytest.mark.parametrize("length", [WINDOW, 14, 40])
def test_keys_that_were_attended_to_are_attended_to_again(length):
    """And read then. Of a block that a ring has no room for nothing may be left in it."""
    of = model("mistral").model.layers[0].self_attn
    cache, plain = Cache(model("mistral").config), []
    torch.manual_seed(0)
    with torch.no_grad():
        for block in (length, 1, 14, 3):
            query, key, value = torch.randn(2, 4, block, 8), torch.randn(2, 2, block, 8), torch.randn(2, 2, block, 8)
            plain.append((key, value))
            keys, values = (torch.cat(parts, 2) for parts in zip(*plain, strict=True))
            total = keys.shape[2]
            place = torch.arange(total)
            distance = place[total - block :, None] - place
            seen = ((distance >= 0) & (distance < WINDOW))[None, None]
            own = seen[..., total - cache.get_mask_sizes(block, 0)[0] :]
            held = cache.update(key, value, 0)
            expected = _dense(query, keys, values, seen)
            run = AttentionInterface._global_mapping["pygen"]
            for _ in range(3):
                out, _ = run(of, query, *held, own, scaling=of.scaling)
                torch.testing.assert_close(out, expected.transpose(1, 2))
                assert out.is_contiguous()
            assert torch.equal(held[0].clone(), keys[:, :, -held[0].shape[2] :])
            assert torch.equal(held[1].clone(), values[:, :, -held[0].shape[2] :])


def _dense(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, keys, values, seen, enable_gqa=True)


def test_no_layer_of_a_model_served_in_part_is_held_that_cannot_be():
    layers = Cache(of_pictures()[0].config).layers
    assert all(isinstance(layer, HeldLayer) for layer in layers)
    assert [layer.leader is None for layer in layers] == [True, True, False, True]
