"""The paged cache: sequences that share pages against attention over plain lists of tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pygen import ops
from pygen.nn.paged_cache import PagedCache

TOLERANCE = {None: 1e-5, torch.bfloat16: 5e-2, "int8": 5e-2, "fp8": 0.4}
LAYERS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 8


class Model:
    """A network's keys, values and queries, which follow from a token, its place and the layer alone."""

    def __init__(self) -> None:
        self.table = torch.randn(LAYERS, 4, 64, HEADS + 2 * KV_HEADS, WIDTH)

    def of(self, layer: int, tokens: list[int], start: int = 0) -> tuple[Tensor, ...]:
        """query, key, value, each (heads, tokens, width)."""
        rows = [self.table[layer, token, start + i] for i, token in enumerate(tokens)]
        packed = torch.stack(rows, 1) if rows else torch.zeros(HEADS + 2 * KV_HEADS, 0, WIDTH)
        return packed.split([HEADS, KV_HEADS, KV_HEADS])

    def full(self, layer: int, tokens: list[int], last: int) -> Tensor:
        """The attention of the last tokens, (heads, last, width)."""
        query, key, value = (x.unsqueeze(0) for x in self.of(layer, tokens))
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[
            0, :, len(tokens) - last :
        ]


def step(
    cache: PagedCache, model: Model, there: dict[int, list[int]], new: dict[int, list[int]], tolerance: float
) -> None:
    """Append to some sequences in all layers, and compare."""
    block = len(next(iter(new.values())))
    cache.extend(list(new), block, list(new.values()))
    for number, tokens in new.items():
        there[number] = there[number] + tokens
    for layer in range(LAYERS):
        parts = [model.of(layer, tokens, len(there[number]) - block) for number, tokens in new.items()]
        out = cache.append_and_attend(layer, *(torch.stack(x) for x in zip(*parts, strict=True)))
        for own, number in zip(out, new, strict=True):
            expected = model.full(layer, there[number], block)
            torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=40)
@given(st.data())
def test_sequences_are_lists_of_tokens(data):
    torch.manual_seed(0)
    storage = data.draw(st.sampled_from(sorted(TOLERANCE, key=str)))
    cache = PagedCache(
        LAYERS, data.draw(st.integers(6, 16)), page_size=data.draw(st.sampled_from([1, 4])), storage=storage
    )
    model, there = Model(), {}
    for _ in range(data.draw(st.integers(1, 10))):
        action = data.draw(st.sampled_from(["add", "step", "step", "step", "fork", "crop", "free"]))
        if action == "add" or not there:
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=9))
            number, known = cache.add(prompt)
            there[number] = prompt[:known]
            if cache.free_pages >= len(prompt):
                step(cache, model, there, {number: prompt[known:]}, TOLERANCE[storage])
        elif action == "step":
            numbers = data.draw(st.lists(st.sampled_from(sorted(there)), unique=True, min_size=1, max_size=3))
            block = data.draw(st.integers(1, 3))
            if cache.free_pages >= len(numbers) * (block + 1):
                tokens = {n: data.draw(st.lists(st.integers(0, 3), min_size=block, max_size=block)) for n in numbers}
                step(cache, model, there, tokens, TOLERANCE[storage])
        elif action == "fork":
            number = data.draw(st.sampled_from(sorted(there)))
            for other in cache.fork(number, 2):
                there[other] = list(there[number])
        elif action == "crop":
            number = data.draw(st.sampled_from(sorted(there)))
            there[number] = there[number][: data.draw(st.integers(0, len(there[number])))]
            cache.crop(number, len(there[number]))
        else:
            number = data.draw(st.sampled_from(sorted(there)))
            cache.free(number)
            del there[number]
        for number, tokens in there.items():
            assert cache.length(number) == len(tokens)
            if tokens:
                for held, expected in zip(cache.read(1, number), model.of(1, tokens)[1:], strict=True):
                    torch.testing.assert_close(held.float(), expected, rtol=0.1, atol=TOLERANCE[storage])
    for number in there:
        cache.free(number)
    assert cache.free_pages == cache.table.page_count


def test_a_shared_beginning_is_computed_once(backend, device):
    cache = PagedCache(1, 16, page_size=4)
    query, key, value = (torch.randn(1, heads, 11, WIDTH, device=device) for heads in (HEADS, KV_HEADS, KV_HEADS))
    prompt = list(range(11))
    first, known = cache.add(prompt)
    assert known == 0
    cache.extend([first], 11, [prompt])
    whole = cache.append_and_attend(0, query, key, value)
    second, known = cache.add(prompt)
    assert known == 8
    cache.extend([second], 3, [prompt[8:]])
    rest = cache.append_and_attend(0, *(x[:, :, 8:] for x in (query, key, value)))
    torch.testing.assert_close(rest, whole[:, :, 8:])
    assert cache.free_pages == 16 - 4


def test_windows_and_rotary_reach_the_pages():
    query, key, value = (torch.randn(2, heads, 20, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    turning = ops.Rotary(*ops.rotary_tables(30, WIDTH))
    options = {"window": 5, "sinks": 2}
    cache = PagedCache(1, 8, page_size=8, **options)
    cache.extend([cache.add()[0], cache.add()[0]], 20)
    out = cache.append_and_attend(0, query, key, value, rotary=turning, scale=0.3)
    caches = [torch.zeros(2, KV_HEADS, 30, WIDTH) for _ in range(2)]
    lengths = torch.zeros(2, dtype=torch.int32)
    expected = ops.attend_cached(query, key, value, *caches, lengths, rotary=turning, scale=0.3, **options)
    torch.testing.assert_close(out, expected)


def test_misuse_is_refused_before_anything_is_written():
    cache = PagedCache(1, 3, page_size=4)
    query, key, value = (torch.randn(2, heads, 1, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    with pytest.raises(ValueError, match="without an open block, but expected `extend` before it"):
        cache.append_and_attend(0, query, key, value)
    first, second = cache.add()[0], cache.add()[0]
    cache.extend([first, second], 1)
    cache.append_and_attend(0, query, key, value)
    held = cache._buffers[0][0].clone()
    with pytest.raises(ValueError, match=r"key has shape \(1, 2, 1, 8\), but expected \(2, kv_heads, 1, width\)"):
        cache.append_and_attend(0, query[:1], key[:1], value[:1])
    with pytest.raises(
        ValueError, match=r"key has shape \(2, 3, 1, 8\), but expected \(2, 2, 1, 8\)|query has 4 heads"
    ):
        cache.append_and_attend(0, query, key[:, [0, 1, 1]], value[:, [0, 1, 1]])
    cache.extend([first, second], 1)
    cache.free(second)
    with pytest.raises(ValueError, match="without an open block"):
        cache.append_and_attend(0, query, key, value)
    for call in (lambda: cache.extend([first, second], 1), lambda: cache.free(second), lambda: cache.crop(second, 0),
                 lambda: cache.fork(second), lambda: cache.read(0, second)):  # fmt: skip
        with pytest.raises(ValueError, match=f"sequence {second} was freed"):
            call()
    with pytest.raises(RuntimeError, match="the sequences need 3 more pages, but 2 of 3 are free"):
        cache.extend([first], 11)
    assert torch.equal(cache._buffers[0][0].nan_to_num(), held.nan_to_num())
    assert cache.length(first) == 2
