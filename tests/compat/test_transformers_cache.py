"""pygen's caches in transformers' interface: what they hold, against transformers' own, and what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AttentionInterface, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers_cases import WINDOW, choose, greedy, model, padded, prompts, run_with

from pygen.compat.transformers import Cache, PagedCache, convert, patch
from pygen.compat.transformers.cache import Layer
from pygen.compat.transformers.held import Held
from pygen.ops import Rotary, rotary_tables

HEADS, WIDTH = 2, 4


def _block(rows: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, HEADS, length, WIDTH), torch.randn(rows, HEADS, length, WIDTH)


def _same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for held, expected in zip(ours, theirs, strict=True):
        assert isinstance(held, Held)
        assert held.shape == expected.shape
        assert held.dtype == expected.dtype
        assert torch.equal(held.clone(), expected)


@settings(max_examples=60)
@given(data=st.data(), window=st.sampled_from((None, 2, 5)), capacity=st.sampled_from((None, 60)))
def test_a_layer_holds_what_transformers_layer_holds(data, window, capacity):
    """Through any sequence of blocks, crops and choices of rows."""
    torch.manual_seed(0)
    rows = data.draw(st.integers(1, 3))
    if window is None:
        ours, theirs = Layer(capacity=capacity), DynamicLayer()
    else:
        ours, theirs = Layer(window=window, is_sliding=True), DynamicSlidingWindowLayer(window)
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(("update", "update", "crop", "reorder", "repeat", "select", "reset")))
        length = theirs.get_seq_length()
        if action == "update" and length < 50:
            size = data.draw(st.integers(1, 9))
            sizes = ours.get_mask_sizes(size)
            block = _block(rows, size)
            held = ours.update(*block)
            full = theirs.update(*block)
            if data.draw(st.booleans()):  # or it is read by the next call
                _same(held, full)
            assert sizes == (full[0].shape[2], length + size - sizes[0])
        elif action == "crop" and length and window is None:
            back = data.draw(st.integers(0, length - 1))
            ours.crop(-back)
            theirs.crop(-back)
        elif action in ("reorder", "select") and length:
            index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3)))
            if action == "reorder":
                ours.reorder_cache(index)
                theirs.reorder_cache(index)
            else:
                ours.batch_select_indices(index)
                theirs.batch_select_indices(index)
            rows = len(index)
        elif action == "repeat" and length and rows < 3:
            ours.batch_repeat_interleave(2)
            theirs.batch_repeat_interleave(2)
            rows *= 2
        elif action == "reset":
            ours.reset()
            theirs.reset()
        assert ours.get_seq_length() == theirs.get_seq_length()
        if window is None and ours.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


def test_tokens_taken_back_from_a_window_leave_the_window():
    layer = Layer(window=5, is_sliding=True)
    layer.activate_past_recording()
    blocks = [_block(2, size) for size in (30, 7, 4)]
    for block in blocks:
        layer.update(*block)
    layer.crop(-6)
    assert layer.get_seq_length() == 35
    keys = torch.cat([key for key, _ in blocks], 2)[:, :, :35]
    assert torch.equal(layer.keys, keys[:, :, -4:])
    more = _block(2, 2)
    keys = torch.cat((keys, more[0]), 2)
    assert torch.equal(layer.update(*more)[0].clone(), keys[:, :, -6:])


def test_as_many_tokens_as_came_since_are_taken_back_from_a_window():
    """At once or one by one, and again; a long prompt's room is given back."""
    torch.manual_seed(0)
    layer, keys = Layer(window=5, is_sliding=True), torch.empty(2, HEADS, 0, WIDTH)

    def add(size: int) -> None:
        nonlocal keys
        block = _block(2, size)
        keys = torch.cat((keys, block[0]), 2)
        assert torch.equal(layer.update(*block)[0].clone(), keys[:, :, -(4 + size) :])

    def take_back(count: int) -> None:
        nonlocal keys
        layer.crop(-count)
        keys = keys[:, :, : keys.shape[2] - count]
        assert layer.get_seq_length() == keys.shape[2]
        assert torch.equal(layer.keys, keys[:, :, -4:])

    add(20)
    layer.activate_past_recording()  # with tokens in it, and before any that are taken back
    add(3000)
    take_back(2900)
    take_back(0)
    assert layer._store.room < 1000
    for _ in range(2):
        add(700)
        take_back(699)
        for _ in range(600):
            add(1)
        take_back(600)
    layer.reset()
    keys = keys[:, :, :0]
    add(9)
    take_back(7)


def test_longer_drafts_than_a_ring_has_slack_are_taken_back():
    of, prompt = model("mistral"), prompts(1, 6).tile(1, 60)
    options = {"input_ids": prompt, "prompt_lookup_num_tokens": 320, "max_new_tokens": 330}

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
            return torch.full((1,), input_ids.shape[1] >= 370)

    expected = greedy(of, **options, stopping_criteria=StoppingCriteriaList([Stop()]))
    with patch():
        assert torch.equal(greedy(of, **options, stopping_criteria=StoppingCriteriaList([Stop()])), expected)


@pytest.mark.parametrize("first", ["no gradient", "a gradient"])
@pytest.mark.parametrize("kind", ["growing", "paged"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("way", ["patch", "convert", "sdpa"])
def test_a_gradient_through_a_cache_is_transformers(way, name, kind, first):
    of, tokens = copy.deepcopy(model(name)), prompts(2, 30)

    def run(cache: Any) -> list[Tensor]:
        logits = []
        for i, part in enumerate(tokens.split((12, 3, 1, 14), 1)):
            with torch.set_grad_enabled(i != 1 and (i > 0 or first == "a gradient")):
                logits.append(of(part, past_key_values=cache, use_cache=True).logits)
        loss: Tensor = torch.cat(logits, 1).square().mean()
        return [loss, *torch.autograd.grad(loss, list(of.parameters()))]

    expected = run(DynamicCache(config=of.config))
    with run_with(way, of):
        cache = PagedCache(of.config, pages=40, page_size=4) if kind == "paged" else Cache(of.config)
        actual = run(cache)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("kind", ["growing", "paged"])
def test_a_gradient_goes_with_rows_that_are_chosen(kind):
    config = model("llama").config
    found = []
    for cache in (PagedCache(config, pages=40) if kind == "paged" else Cache(config), DynamicCache(config=config)):
        torch.manual_seed(0)
        first, second = _block(2, 5), _block(3, 2)
        for tensor in (*first, *second):
            tensor.requires_grad_()
        cache.update(*first, 0)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 1]))
        cache.crop(-2)
        keys, values = cache.update(*second, 0)
        weight = torch.randn(keys.shape)
        gradient = torch.autograd.grad((keys * weight).sum() + (values * weight.flip(2)).sum(), (*first, *second))
        found.append([keys, values, *gradient])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["growing", "ring", "paged"])
def test_a_step_that_broke_off_is_told_by_the_next(kind):
    of = model("mistral" if kind == "ring" else "llama")
    cache = PagedCache(of.config, pages=40) if kind == "paged" else Cache(of.config)
    layer, tokens = of.model.layers[1], prompts(2, 9)

    def stop(*_: Any) -> None:
        raise KeyError("the second layer")

    with patch(), torch.no_grad():
        of(tokens, past_key_values=cache)
        hook = layer.register_forward_pre_hook(stop)
        with pytest.raises(KeyError):
            of(tokens[:, :1], past_key_values=cache)
        hook.remove()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="^a layer of the cache has 9 tokens, but expected 1[01], as"):
                of(tokens[:, :1], past_key_values=cache)
        cache.reset()
        for part in tokens.split(4, 1):
            logits = of(part, past_key_values=cache).logits
        torch.testing.assert_close(logits[:, -1], of(tokens).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_pages_are_given_back_though_a_row_is_gone():
    cache = PagedCache(model("llama").config, pages=40, page_size=2)
    for layer in range(2):
        cache.update(*_block(3, 5), layer)[0].clone()
    cache.pool.free(cache.rows[1])
    cache.reset()
    assert cache.pool.free_pages == 40
    assert cache.rows == []
    assert cache.get_seq_length() == 0
    cache.update(*_block(2, 3), 0)
    assert cache.pool.free_pages == 36


def test_what_a_cache_says_of_itself():
    config = model("qwen3").config
    cache = Cache(config)
    assert cache.is_sliding == [True, False]
    assert (cache.get_max_length(), cache.get_max_length(0), cache.get_max_length(1)) == (WINDOW, WINDOW, -1)
    assert Cache(model("llama").config, capacity=40).get_max_length() == 40
    assert not cache.is_compileable
    assert not cache.is_initialized
    assert cache.is_croppable
    assert (cache.get_seq_length(), cache.layers[0].keys) == (0, None)
    assert repr(cache) == "Cache(layers=[Layer(window=8), Layer()])"
    held, _ = cache.update(*_block(1, 3), 1)
    assert repr(held) == "Held(keys of Layer(), (1, 2, 3, 4))"
    lazy = Cache(capacity=9)
    lazy.update(*_block(1, 3), 1)
    assert len(lazy) == 2
    with pytest.raises(NotImplementedError, match="cannot be offloaded"):
        cache.layers[0].offload()


@pytest.mark.parametrize("storage", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_codes_give_nearly_the_same_logits(name, storage):
    """By pygen's attention, which reads the codes, and by PyTorch's, which is given what they stand for."""
    of, prompt, later = model(name), prompts(2, 12), prompts(2, 6, seed=1)
    with torch.no_grad():
        exact = of(torch.cat((prompt, later), 1)).logits[:, 12:]
        found = []
        for way in ("pygen", "sdpa"):
            with choose(of, way):
                cache = Cache(of.config, storage=storage)
                of(prompt, past_key_values=cache)
                found.append(torch.cat([of(later[:, i : i + 1], past_key_values=cache).logits for i in range(6)], 1))
    if name != "mistral":  # where the block of a window is given to PyTorch as it came
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    for logits in found:
        error = (logits - exact).norm() / exact.norm()
        assert 1e-6 < error < (0.05 if storage == "int8" else 0.2)


@pytest.mark.parametrize("sizes", [(5, 20, 1, 1, 7, 1, 5), (1,) * 40])
@pytest.mark.parametrize("way", ["pygen", "convert"])
def test_a_window_of_the_users_with_sinks_is_a_mask(way, sizes):
    """With the places that keys had; after convert, where angles depend on more than the place."""
    of, tokens = model("llama"), prompts(2, 40)
    if way == "convert":
        of = copy.deepcopy(of)
        config = copy.deepcopy(of.config)
        config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
        of.model.rotary_emb = LlamaRotaryEmbedding(config)
    place = torch.arange(40)
    near = place[:, None] - place[None, :] < 6
    seen = (place[:, None] >= place[None, :]) & (near | (place[None, :] < 3))
    with torch.no_grad():
        expected = of(tokens, attention_mask=seen[None, None].expand(2, 1, -1, -1)).logits
        with choose(of, "pygen") if way == "pygen" else convert(of):
            cache = Cache(of.config, window=6, sinks=3)
            actual = torch.cat([of(part, past_key_values=cache).logits for part in tokens.split(sizes, 1)], 1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class _Unturned(nn.Module):
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin


def _streaming(of: Any, tokens: Tensor, missing: Tensor, window: int, sinks: int) -> Tensor:
    """The logits of StreamingLLM (Xiao et al. 2023, section 3.2), a token at a time: the keys that are kept are turned
    by their places among those that are kept. The first `missing` tokens of a row are padding."""
    of = copy.deepcopy(of)
    rows, length = tokens.shape
    cos, sin = of.model.rotary_emb(of.lm_head.weight, torch.arange(length)[None])
    of.model.rotary_emb = _Unturned()
    of.model.rotary_emb.cos, of.model.rotary_emb.sin = torch.ones_like(cos), torch.zeros_like(sin)

    def turned(x: Tensor, start: int, end: int) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[0, start:end] + torch.cat((-second, first), -1) * sin[0, start:end]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        out = torch.zeros_like(query)
        own = getattr(module, "sliding_window", None)
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        for row in range(rows):
            for i in range(int(missing[row]), length):
                first, kept = (0, own) if own else (sinks, window)
                places = [j for j in range(int(missing[row]), i + 1) if j < first or j > i - kept]
                score = turned(key[row, :, places], 0, len(places)) @ turned(
                    query[row, :, i : i + 1], len(places) - 1, len(places)
                ).transpose(1, 2)
                out[row, :, i] = ((score * module.scaling).softmax(1) * value[row, :, places]).sum(1)
        return out.transpose(1, 2), None

    functions = AttentionInterface._global_mapping
    functions["streaming"] = attention
    try:
        of.config._attn_implementation_internal = "streaming"
        return of(tokens, use_cache=False).logits  # type: ignore[no-any-return]
    finally:
        del functions["streaming"]


@settings(max_examples=40)
@example("llama", 6, 3, [1] * 40, [0, 0], 0)
@example("llama", 6, 3, [12] + [1] * 28, [0, 0], 0)
@example("llama", 6, 3, [1] * 40, [7, 0, 2], 0)
@example("qwen3", 20, 2, [24, 1, 1, 14], [0, 5], 90)
@given(
    name=st.sampled_from(["llama", "qwen3"]), window=st.integers(1, 20), sinks=st.integers(0, 5),
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=6),
    missing=st.lists(st.integers(0, 9), min_size=1, max_size=3), start=st.integers(0, 100),
)  # fmt: skip
def test_after_convert_sinks_have_the_places_before_the_window(name, window, sinks, sizes, missing, start):
    """In blocks of any sizes, rows in any order, whatever the first position is."""
    of, rows = model(name), len(missing)
    length = sum(sizes)
    tokens, begin = prompts(rows, length), torch.tensor(missing)
    real = torch.arange(length) >= begin[:, None]
    positions = start + (torch.arange(length) - begin[:, None]).clamp(min=0)

    def run(order: list[int]) -> Tensor:
        cache, logits, done = Cache(of.config, window=window, sinks=sinks), [], 0
        for size in sizes:
            now = slice(done, done + size)
            done += size
            logits.append(
                of(
                    tokens[order, now], attention_mask=real[order, :done].long(), position_ids=positions[order, now],
                    past_key_values=cache,
                ).logits
            )  # fmt: skip
        return torch.cat(logits, 1)

    with torch.no_grad():
        expected = _streaming(of, tokens, begin, window, sinks)
        with convert(of):
            actual, reversed_rows = run([*range(rows)]), run([*reversed(range(rows))]).flip(0)
    torch.testing.assert_close(actual[real], expected[real], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(actual[real], reversed_rows[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["patch", "convert"])
def test_generation_goes_on_past_a_window_with_sinks(way):
    of = model("llama")
    with run_with(way, of):
        cache = Cache(of.config, window=6, sinks=2, storage="int8")
        tokens = greedy(of, **padded(prompts()), past_key_values=cache, max_new_tokens=60)
    assert tokens.shape == (3, 81)
    assert cache.get_seq_length() == 80


def test_what_a_cache_cannot_be_is_refused():
    llama, mistral = model("llama").config, model("mistral").config
    for arguments, message in (
        ({"config": llama, "sinks": 3}, "sinks is 3, but expected 0 without a window"),
        ({"sinks": 3}, "sinks is 3, but expected 0 without a window"),
        ({"config": mistral, "window": 4}, "window is 4, but expected None: all layers of the model have windows"),
        ({"config": llama, "storage": "int4"}, "storage is 'int4', but expected 'int8', 'fp8' or a dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            Cache(**arguments)
    with pytest.raises(ValueError, match="sinks is 1, but expected 0 in a layer whose model has a window"):
        Layer(window=4, sinks=1, is_sliding=True)


def test_what_does_not_fit_is_refused_before_anything_is_written():
    layer = Layer(capacity=6)
    block = _block(2, 5)
    layer.update(*block)
    with pytest.raises(ValueError, match="^key_states has 2 tokens behind 5, but expected at most 6 in all"):
        layer.update(*_block(2, 2))
    assert torch.equal(layer.keys, block[0])
    with pytest.raises(ValueError, match="^tokens_to_remove is 2, but expected 0, or less"):
        layer.crop(2)
    of = model("llama")
    with choose(of, "pygen"), pytest.raises(ValueError, match=r"^key_states has 1 tokens behind 25"):
        greedy(of, input_ids=prompts(), past_key_values=Cache(of.config, capacity=25))
    wide = Layer()
    wide.update(*block)
    with pytest.raises(ValueError, match="has shape"):
        wide.update(*_block(3, 1))[0].clone()
    assert wide.get_seq_length() == 5
    assert torch.equal(wide.keys, block[0])


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("kind", ["growing", "ring", "paged"])
def test_a_block_that_is_refused_is_not_counted(kind, before):
    torch.manual_seed(0)
    cos, sin = rotary_tables(20, WIDTH)
    config = model("llama").config

    def make() -> Any:
        if kind == "paged":
            return PagedCache(config, pages=20, page_size=2)
        return Cache(config, window=4, sinks=1) if kind == "ring" else Cache(config)

    cache, other = make(), make()
    first, block = _block(2, before), _block(2, 2)
    query = torch.randn(2, HEADS, 2, WIDTH)
    for each in (cache, other) if before else ():
        for layer in each.layers:
            layer.append_and_attend(first[0], first, None, True, None, Rotary(cos, sin))
    layer = cache.layers[0]
    free = cache.pool.free_pages if kind == "paged" else 0
    with pytest.raises(ValueError, match="but expected"):
        layer.append_and_attend(query[..., :2], block, None, True, None, Rotary(cos, sin))
    assert layer.get_seq_length() == before
    cache.update(*block, 0)
    with pytest.raises(ValueError, match="but expected"):
        layer.attend(query[..., :2], None, True, None)
    assert layer.get_seq_length() == before
    assert kind != "paged" or cache.pool.free_pages == free
    actual, expected = (
        each.layers[0].append_and_attend(query, block, None, True, None, Rotary(cos, sin)) for each in (cache, other)
    )
    assert torch.equal(actual, expected)
    assert layer.get_seq_length() == before + 2


def test_a_window_that_the_model_does_not_know_of_is_read_by_pygen_alone():
    of = model("llama")
    with pytest.raises(RuntimeError, match=r'expected model\.set_attn_implementation\("pygen"\)'):
        greedy(of, input_ids=prompts(), past_key_values=Cache(of.config, window=6))


def test_pages_are_shared_given_back_and_counted():
    of, config = model("llama"), model("llama").config
    cache = PagedCache(config, pages=40, page_size=4)
    with patch():
        expected = greedy(of, input_ids=prompts(1), num_beams=5)
        assert torch.equal(greedy(of, input_ids=prompts(1), num_beams=5, past_key_values=cache), expected)
        # Five beams of 40 tokens would be 50 pages apart; they share those of the prompt.
        assert 40 - cache.pool.free_pages <= 5 + 5 * 6
        cache.reset()
        assert cache.pool.free_pages == 40
        assert cache.get_seq_length() == 0
        with pytest.raises(RuntimeError, match="page"):
            greedy(of, input_ids=prompts(3), past_key_values=PagedCache(config, pages=15, page_size=4))
    cache.update(*_block(2, 3), 0)
    with pytest.raises(ValueError, match="^key_states has 3 rows, but expected 2, as the tokens before"):
        cache.update(*_block(3, 1), 0)


@settings(max_examples=20)
@given(data=st.data())
def test_a_paged_cache_holds_what_transformers_holds(data):
    torch.manual_seed(0)
    config = model("llama").config
    ours, theirs = PagedCache(config, pages=200, page_size=2), DynamicCache(config=config)
    rows = 2
    for _ in range(data.draw(st.integers(1, 7))):
        action = data.draw(st.sampled_from(("update", "update", "crop", "reorder", "repeat", "select")))
        if action == "update" or not theirs.get_seq_length():
            size = data.draw(st.integers(1, 5))
            for layer in range(2):
                block = _block(rows, size)
                _same(ours.update(*block, layer), theirs.update(*block, layer))
        elif action == "crop":
            back = data.draw(st.integers(0, theirs.get_seq_length() - 1))
            ours.crop(-back)
            theirs.crop(-back)
        elif action == "repeat" and rows < 4:
            ours.batch_repeat_interleave(2)
            theirs.batch_repeat_interleave(2)
            rows *= 2
        else:
            index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)))
            change = "reorder_cache" if action == "reorder" else "batch_select_indices"
            getattr(ours, change)(index)
            getattr(theirs, change)(index)
            rows = len(index)
        for layer in range(2):
            assert torch.equal(ours.layers[layer].keys, theirs.layers[layer].keys)
            assert torch.equal(ours.layers[layer].values, theirs.layers[layer].values)
    ours.reset()
    assert ours.pool.free_pages == 200
