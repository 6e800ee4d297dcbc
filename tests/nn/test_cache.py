"""The key/value cache classes: a batch of token lists, whatever is appended, cropped, reordered and forked."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pygen import ops
from pygen.nn.cache import KeyValueCache
from pygen.nn.layer_caches import LayerCaches

# What an error in keys and values of about 1 makes of an output, by storage.
TOLERANCE = {None: 1e-5, torch.bfloat16: 5e-2, "int8": 5e-2, "fp8": 0.4}

Row = list[tuple[Tensor, Tensor]]  # the tokens of a row: keys and values (kv_heads, width)


def tokens(batch: int, block: int, *, heads: int = 4, kv_heads: int = 2, width: int = 8) -> tuple[Tensor, ...]:
    query, key, value = (torch.randn(batch, count, block, width) for count in (heads, kv_heads, kv_heads))
    return query, key, value


def attended(query: Tensor, row: Row, window: int | None = None, sinks: int = 0) -> Tensor:
    """What the last token of a row sees, from its query (heads, width)."""
    seen = [pair for j, pair in enumerate(row) if window is None or j < sinks or j >= len(row) - window]
    keys, values = (torch.stack([pair[x] for pair in seen], 1) for x in range(2))
    return scaled_dot_product_attention(query[None, :, None], keys[None], values[None], enable_gqa=True)[0, :, 0]


class Rows:
    """A cache beside the lists that it stands for."""

    def __init__(self, batch: int, cache: KeyValueCache, tolerance: float) -> None:
        self.cache, self.tolerance = cache, tolerance
        self.rows: list[Row] = [[] for _ in range(batch)]

    def append(self, block: int, *, at_once: bool) -> None:
        query, key, value = tokens(len(self.rows), block)
        if at_once:
            out = self.cache.append_and_attend(query, key, value)
        else:
            self.cache.append(key, value)
            out = self.cache.attend(query)
        for b, row in enumerate(self.rows):
            for i in range(block):
                row.append((key[b, :, i], value[b, :, i]))
                expected = attended(query[b, :, i], row, self.cache.window, self.cache.sinks)
                torch.testing.assert_close(out[b, :, i], expected, rtol=self.tolerance, atol=self.tolerance)

    def crop(self, kept: list[int], how: str) -> None:
        if how == "back":
            self.cache.crop(-1 - kept[0])
            self.rows = [row[: max(len(row) - 1 - kept[0], 0)] for row in self.rows]
            return
        kept = kept if how != "all alike" else kept[:1] * len(self.rows)
        self.cache.crop(kept[0] if how == "all alike" else torch.tensor(kept) if how == "tensor" else kept)
        self.rows = [row[:length] for row, length in zip(self.rows, kept, strict=True)]

    def take(self, index: list[int]) -> None:
        self.rows = [list(self.rows[i]) for i in index]

    def check(self) -> None:
        if self.cache.lengths is None:
            return
        assert self.cache.lengths.tolist() == [len(row) for row in self.rows]
        assert self.cache.length >= max(len(row) for row in self.rows)
        if self.cache.window is None:
            for x, held in enumerate((self.cache.keys, self.cache.values)):
                for b, row in enumerate(self.rows):
                    for i, pair in enumerate(row):
                        torch.testing.assert_close(
                            held[b, :, i].float(), pair[x], rtol=self.tolerance, atol=self.tolerance
                        )


@settings(max_examples=60)
@given(st.data())
def test_a_cache_is_a_list_of_tokens_for_each_row(data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    window = data.draw(st.sampled_from([None, None, 3, 6]))
    sinks = 0 if window is None else data.draw(st.integers(0, 2))
    storage = data.draw(st.sampled_from(sorted(TOLERANCE, key=str)))
    cache = KeyValueCache(window=window, sinks=sinks, storage=storage)
    both = Rows(data.draw(st.integers(1, 3)), cache, TOLERANCE[storage])
    for _ in range(data.draw(st.integers(1, 10))):
        batch = len(both.rows)
        action = data.draw(
            st.sampled_from(["append", "append", "append", "crop", "reorder", "fork", "select", "reset", "resize"])
        )
        if action == "append" or cache.lengths is None:
            block = data.draw(st.sampled_from([1, 1, 2, 9, 70]))
            both.append(block, at_once=data.draw(st.booleans()) or (window is not None and block > 1))
        elif action == "crop" and window is None:
            kept = data.draw(st.lists(st.integers(0, 12), min_size=batch, max_size=batch))
            both.crop(kept, data.draw(st.sampled_from(["all alike", "list", "tensor", "back"])))
        elif action == "resize" and window is not None:
            cache.resize(sinks + window + data.draw(st.integers(0, 30)))
        elif action == "reorder":
            index = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
            cache.reorder(torch.tensor(index))
            both.take(index)
        elif action == "fork" and batch < 4:
            copies = data.draw(st.integers(1, 2))
            cache.fork(copies)
            both.take([b for b in range(batch) for _ in range(copies)])
        elif action == "select":
            index = sorted(data.draw(st.sets(st.integers(0, batch - 1), min_size=1)))
            mask = torch.zeros(batch, dtype=torch.bool)
            mask[index] = True
            cache.select(mask if data.draw(st.booleans()) else torch.tensor(index))
            both.take(index)
        elif action == "reset":
            cache.reset()
            both.rows = [[] for _ in both.rows]
        both.check()


def test_appends_run_on_every_backend(backend, device):
    for options in ({}, {"storage": "int8"}, {"window": 9, "sinks": 2}):
        cache = KeyValueCache(**options)
        query, key, value = (x.to(device) for x in tokens(2, 6))
        whole = cache.append_and_attend(query, key, value)
        cache.crop(0)
        parts = [
            cache.append_and_attend(*(x[:, :, i : i + 1] for x in (query, key, value))) for i in range(6)
        ]  # fmt: skip
        torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_a_growing_cache_copies_a_token_about_once():
    cache = KeyValueCache()
    rooms, views = set(), 0
    for _ in range(1000):
        cache.append(*tokens(1, 1)[1:])
        rooms.add(cache.room)
        views += cache.keys.data_ptr() == cache._buffers[0].data_ptr()
    assert rooms == {64, 128, 256, 512, 1024}
    assert views == 1000
    assert cache.keys.shape == (1, 2, 1000, 8)


def test_a_crop_by_a_tensor_does_not_make_a_cache_grow_or_full():
    for cache in (KeyValueCache(), KeyValueCache(64)):
        for _ in range(10):
            cache.append(*tokens(2, 60)[1:])
            cache.crop(torch.tensor([1, 2]))
        assert cache.room == 64
        assert cache.length >= 2
        assert cache.lengths.tolist() == [1, 2]


def test_a_full_cache_refuses_before_anything_is_written():
    cache = KeyValueCache(5)
    cache.append(*tokens(2, 3)[1:])
    cache.crop([2, 3])
    keys, lengths = cache._buffers[0].clone(), cache.lengths.clone()
    query, key, value = tokens(2, 3)
    for call in (lambda: cache.append(key, value), lambda: cache.append_and_attend(query, key, value)):
        with pytest.raises(ValueError, match="key has 3 tokens behind 3, but expected at most 5 in all"):
            call()
    assert torch.equal(cache._buffers[0], keys)
    assert torch.equal(cache.lengths, lengths)
    cache.append(*tokens(2, 2)[1:])
    assert cache.lengths.tolist() == [4, 5]


def test_other_sizes_are_refused_before_anything_is_written():
    cache = KeyValueCache()
    _, key, value = tokens(2, 3)
    cache.append(key, value)
    for wrong, sentence in (
        ((key[:1], value[:1]), r"key has shape \(1, 2, 3, 8\), but expected \(2, 2, block, 8\)"),
        ((key[:, :1], value), r"key has shape \(2, 1, 3, 8\), but expected \(2, 2, block, 8\)"),
        ((key, value[..., :4]), r"value has shape \(2, 2, 3, 4\), but expected \(2, 2, block, 8\)"),
        ((key, value[:, :, :1]), r"value has shape \(2, 2, 1, 8\), but expected \(2, 2, block, 8\)"),
        ((key[0], value), r"key has shape \(2, 3, 8\), but expected \(2, 2, block, 8\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            cache.append(*wrong)
    with pytest.raises(ValueError, match="query has 3 heads, but expected a multiple of the 2 heads"):
        cache.append_and_attend(torch.randn(2, 3, 3, 8), key, value)
    assert cache.lengths.tolist() == [3, 3]


def test_options_are_refused():
    for options, sentence in (
        ({"sinks": 2}, "sinks is 2, but expected 0 without a window"),
        ({"window": 4, "sinks": 2, "capacity": 5}, "capacity is 5, but expected at least 6"),
        ({"capacity": 0}, "capacity is 0, but expected at least 1"),
        ({"storage": "int4"}, "storage is 'int4', but expected 'int8', 'fp8' or a dtype"),
        ({"storage": torch.int64}, "storage is torch.int64, but expected"),
    ):
        with pytest.raises(ValueError, match=sentence):
            KeyValueCache(**options)
    with pytest.raises(ValueError, match="query was given to an empty cache"):
        KeyValueCache().attend(torch.zeros(1, 1, 1, 8))
    with pytest.raises(ValueError, match="the cache is empty, but expected an append before it is read"):
        _ = KeyValueCache().keys


def test_a_ring_takes_back_what_it_still_has():
    cache = KeyValueCache(window=4, sinks=2, capacity=10)
    both = Rows(1, cache, 1e-5)
    both.append(30, at_once=True)
    with pytest.raises(ValueError, match=r"lengths has 25, but expected at least 26: of 30 tokens those before 22"):
        cache.crop(25)
    cache.crop(-4)
    del both.rows[0][26:]
    both.append(1, at_once=True)
    cache.crop(0)
    both.rows = [[]]
    both.append(3, at_once=True)


@settings(max_examples=60)
@given(st.data())
def test_a_ring_of_another_size_has_the_tokens_that_it_had(data):
    """Rows of several lengths, in rings of any sizes one after another: what is said to be there is, and the window."""
    torch.manual_seed(0)
    window, sinks = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 2))
    storage = data.draw(st.sampled_from(sorted(TOLERANCE, key=str)))
    cache = KeyValueCache(sinks + window + data.draw(st.integers(0, 20)), window=window, sinks=sinks, storage=storage)
    both = Rows(2, cache, TOLERANCE[storage])
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(("append", "append", "resize", "crop")))
        if action == "append":
            both.append(data.draw(st.integers(1, 25)), at_once=True)
        elif action == "resize":
            cache.resize(sinks + window + data.draw(st.integers(0, 20)))
        elif cache.lengths is not None:
            kept = [max(len(row) - data.draw(st.integers(0, 9)), 0) for row in both.rows]
            with contextlib.suppress(ValueError):
                both.crop(kept, "tensor")
        both.check()
        shortest = min(len(row) for row in both.rows) - sinks
        for count in range(1, shortest + 1):
            try:
                recent = cache.recent(count)
            except ValueError:
                assert count > window
                break
            for x, held in enumerate(recent):
                for b, row in enumerate(both.rows):
                    expected = torch.stack([pair[x] for pair in (*row[:sinks], *row[-count:])], 1)
                    torch.testing.assert_close(
                        held[b, :, : sinks + count].float(), expected, rtol=both.tolerance, atol=both.tolerance
                    )


def test_a_ring_is_not_asked_for_what_it_let_go_of():
    cache = KeyValueCache(40, window=4, sinks=2)
    cache.append(*tokens(1, 30)[1:])
    cache.resize(12)
    cache.resize(50)
    with pytest.raises(ValueError, match=r"lengths has 23, but expected at least 24: of 30 tokens those before 20"):
        cache.crop(23)
    with pytest.raises(ValueError, match="count is 11, but expected at most 10, which were not written over"):
        cache.recent(11)
    cache.crop(24)
    for capacity, other, sentence in (
        (5, cache, "capacity is 5, but expected at least 6"),
        (50, KeyValueCache(), "capacity is 50, but expected a cache with a window to resize"),
    ):
        with pytest.raises(ValueError, match=sentence):
            other.resize(capacity)
    with pytest.raises(ValueError, match="count is 3, but expected a cache with a window"):
        KeyValueCache().recent(3)


def test_what_a_window_holds_is_read_in_order():
    for storage in (None, "int8"):
        cache = KeyValueCache(window=5, sinks=2, storage=storage)
        _, key, value = tokens(2, 300)
        cache.append(key, value)
        kept = [0, 1, *range(295, 300)]
        for held, given_ in ((cache.keys, key), (cache.values, value)):
            torch.testing.assert_close(held, given_[:, :, kept], rtol=0, atol=0.03 if storage else 0)
        cache.reset()
        cache.append(key[:, :, :4], value[:, :, :4])
        torch.testing.assert_close(cache.keys, key[:, :, :4], rtol=0, atol=0.03 if storage else 0)


def test_rotary_and_masks_reach_every_part_of_a_long_block():
    cos, sin = ops.rotary_tables(100, 8)
    positions, mask = torch.randint(0, 100, (2, 90)), torch.rand(2, 1, 90, 90) > 0.3
    query, key, value = tokens(2, 90)
    whole, parts = KeyValueCache(window=7, capacity=100), KeyValueCache(window=7, capacity=10)
    options: dict[str, Any] = {"mask": mask, "rotary": ops.Rotary(cos, sin, positions), "scale": 0.4}
    expected = whole.append_and_attend(query, key, value, **options)
    torch.testing.assert_close(parts.append_and_attend(query, key, value, **options), expected)
    with pytest.raises(ValueError, match=r"key has 90 tokens, but expected at most 4 that see each other"):
        parts.append_and_attend(query, key, value, causal=False)


def test_layers_move_together():
    layers = LayerCaches([KeyValueCache(), KeyValueCache()])
    with pytest.raises(ValueError, match="the caches are empty"):
        layers.places(1)
    for layer in range(2):
        layers.attend(layer, *tokens(2, 5))
    assert layers.places(2).tolist() == [[5, 6], [5, 6]]
    layers.crop([3, 5])
    layers.reorder(torch.tensor([1, 0]))
    layers.fork(2)
    layers.select(torch.tensor([0, 2, 3]))
    assert [layer.lengths.tolist() for layer in layers.layers] == [[5, 3, 3]] * 2
    assert layers.places(1).tolist() == [[5], [3], [3]]
    layers.reset()
    assert layers.lengths.tolist() == [0, 0, 0]


def test_a_static_cache_compiles_once_for_all_steps():
    caches = KeyValueCache(40), KeyValueCache(40)
    for cache in caches:
        cache.allocate(2, 2, 8, dtype=torch.float32)
    step = torch.compile(caches[0].append_and_attend, fullgraph=True, backend="aot_eager")
    for _ in range(12):
        new = tokens(2, 1)
        torch.testing.assert_close(step(*new), caches[1].append_and_attend(*new))
    # What compiled steps have appended is known to those that are not.
    assert caches[0].length == 12
    with pytest.raises(ValueError, match="key has 30 tokens behind 12"):
        caches[0].append_and_attend(*tokens(2, 30))


def test_what_is_refused_is_not_counted():
    cache = KeyValueCache()
    key = torch.randn(2, 2, 3, 4)
    cache.append(key, key)
    one = torch.randn(2, 2, 1, 4)
    with pytest.raises(ValueError, match="query has 3 heads"):
        cache.append_and_attend(torch.randn(2, 3, 1, 4), one, one)
    assert cache.length == 3
    assert torch.equal(cache.keys, key)


def test_length_is_that_of_the_longest_row_that_is_left():
    cache = KeyValueCache()
    key = torch.randn(2, 1, 9, 4)
    cache.append(key, key)
    cache.crop([3, 9])
    cache.crop([9, 2])
    assert cache.length == 3
    cache.select(torch.tensor([1]))
    assert cache.length == 2


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (8, 2)])
def test_what_a_graph_appends_again_and_again_is_there(window, sinks, monkeypatch):
    cache = KeyValueCache(24, window=window, sinks=sinks)
    query, key, value = tokens(2, 15)
    cache.append(key[:, :, :1], value[:, :, :1])
    with monkeypatch.context() as recording:
        recording.setattr("pygen.nn.cache._is_recording", lambda _: True)
        cache.append_and_attend(*(x[:, :, 1:2] for x in (query, key, value)))
    buffers, lengths = cache._buffers, cache.lengths
    for i in range(2, 11):  # what replays do, of which the host sees nothing
        one = [x[:, :, i : i + 1] for x in (query, key, value)]
        ops.attend_cached(*one, *buffers, lengths, window=window, sinks=sinks)
    kept = torch.arange(11) if window is None else torch.tensor([0, 1, *range(3, 11)])
    assert cache.length == 11
    assert torch.equal(cache.keys, key[:, :, kept])
    ops.attend_cached(*(x[:, :, 11:12] for x in (query, key, value)), *buffers, lengths, window=window, sinks=sinks)
    cache.reorder(torch.tensor([1, 0]))
    assert torch.equal(cache.values[:, :, -1], value[[1, 0], :, 11])
    assert torch.equal(cache.keys[:, :, 0], key[[1, 0], :, 0])
    if window is None:
        cache.crop(11)
        assert cache.length == 11
        with pytest.raises(ValueError, match="key has 15 tokens behind 11"):
            cache.append(key, value)
    else:
        for _ in range(3):
            ops.append_cached(key, value, *cache._buffers, cache.lengths, window=window, sinks=sinks)
        with pytest.raises(ValueError, match="were written over"):
            cache.crop(30)


@pytest.mark.parametrize("window", [None, 8])
def test_a_graph_replays_the_step_that_it_recorded(window, backend, device):
    if device.type != "cuda":
        pytest.skip("only CUDA has graphs")
    caches = KeyValueCache(32, window=window), KeyValueCache(32, window=window)
    steps = [tuple(x.to(device) for x in tokens(2, 1)) for _ in range(12)]
    fixed = tuple(torch.empty_like(x) for x in steps[0])
    for cache in caches:
        cache.allocate(2, 2, 8, dtype=torch.float32, device=device)
    caches[0].append_and_attend(*(x.zero_() for x in fixed))  # what is loaded at the first launch cannot be recorded
    caches[0].reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = caches[0].append_and_attend(*fixed)
    caches[0].reset()
    for new in steps:
        for to, x in zip(fixed, new, strict=True):
            to.copy_(x)
        graph.replay()
        torch.testing.assert_close(out, caches[1].append_and_attend(*new))
    assert caches[0].length == 12
    assert torch.equal(caches[0].keys, caches[1].keys)
