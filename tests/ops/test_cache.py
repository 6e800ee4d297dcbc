"""Cached attention against its reference, full causal attention, a simulated list of tokens, and float64."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, LAYOUTS, close, opcheck
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pygen import _native, ops

# heads, kv_heads, block, width, capacity, lengths before
SHAPES = [
    (1, 1, 1, 1, 1, [0]),
    (4, 2, 1, 64, 300, [0, 170, 299]),
    (3, 3, 5, 7, 40, [3, 35]),
    (6, 1, 3, 33, 150, [127, 0]),
    (2, 1, 2, 130, 20, [18]),
    (2, 2, 1, 300, 10, [4]),
    (1, 1, 70, 8, 140, [40]),
]


def draw(shape: tuple[object, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """query, key, value, key_cache, value_cache, lengths; what is past the lengths is NaN."""
    heads, kv_heads, block, width, capacity, lengths = shape
    batch = len(lengths)
    query = torch.randn(batch, heads, block, width, device=device).to(dtype)
    key, value = (torch.randn(batch, kv_heads, block, width, device=device).to(dtype) for _ in range(2))
    caches = [torch.randn(batch, kv_heads, capacity, width, device=device).to(dtype) for _ in range(2)]
    for cache in caches:
        for b, length in enumerate(lengths):
            cache[b, :, max(length, 0) :] = math.nan
    return query, key, value, *caches, torch.tensor(lengths, dtype=torch.int32, device=device)


def copies(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in arguments)


def agree(arguments: tuple[Tensor, ...], *, tolerance: float = 2.0, **options: float) -> None:
    """The operator and its reference give the same output and leave the same caches and lengths."""
    ours, theirs = copies(arguments), copies(arguments)
    out = ops.attend_cached(*ours, **options)
    expected = ops.attend_cached_reference(*theirs, **options)
    assert out.dtype == arguments[0].dtype
    close(out, expected, scale=tolerance)
    for mine, wanted in zip(ours[3:], theirs[3:], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(backend, device, dtype):
    for shape in SHAPES:
        for options in ({}, {"scale": 0.3}):
            agree(draw(shape, dtype, device), **options)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixes_dtypes(backend, device, query_dtype, cache_dtype):
    query, key, value, key_cache, value_cache, lengths = draw((4, 2, 2, 24, 20, [0, 9]), torch.float32, device)
    caches = key_cache.to(cache_dtype), value_cache.to(cache_dtype)
    agree((query.to(query_dtype), key, value.to(query_dtype), *caches, lengths))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_any_strides(backend, device, layout):
    make = LAYOUTS[layout]
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = make((2, 4, 3, 16), dtype, device), *(make((2, 2, 3, 16), dtype, device) for _ in range(2))
        # Caches inside larger tensors: (batch, capacity, heads, width), keys beside values, and off by one element.
        beside = torch.randn(2, 12, 2, 32, device=device).to(dtype).transpose(1, 2)
        odd = torch.randn(2, 2, 12, 17, device=device).to(dtype)[..., 1:]
        lengths = torch.tensor([4, 0, 7, 0], dtype=torch.int32, device=device)[::2]
        for caches in ((beside[..., :16], beside[..., 16:]), (odd, odd.flip(0))):
            twins, after, expected_after = [cache.clone() for cache in caches], lengths.clone(), lengths.clone()
            expected = ops.attend_cached_reference(query, key, value, *twins, expected_after)
            close(ops.attend_cached(query, key, value, *caches, after), expected, scale=2)
            assert torch.equal(after, expected_after)
            for cache, twin in zip(caches, twins, strict=True):
                assert torch.equal(cache, twin)


def test_steps_equal_one_block_and_full_attention(backend, device):
    tokens = 37
    for heads, kv_heads, width in ((4, 4, 16), (4, 1, 40)):
        query, key, value, *caches, lengths = draw((heads, kv_heads, tokens, width, 50, [0, 0]), torch.float32, device)
        expected = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        once = ops.attend_cached(query, key, value, *(c.clone() for c in caches), lengths.clone())
        close(once, expected, scale=5)
        steps = [
            ops.attend_cached(*(x[:, :, i : i + 1] for x in (query, key, value)), *caches, lengths)
            for i in range(tokens)
        ]
        close(torch.cat(steps, 2), expected, scale=5)
        assert lengths.tolist() == [tokens, tokens]
        assert torch.equal(caches[0][:, :, :tokens], key)
        assert torch.equal(caches[1][:, :, :tokens], value)
        assert caches[0][:, :, tokens:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_contexts_merge_their_splits(backend, device, dtype):
    length = 1500 if backend == "cpu" else 400
    for heads, kv_heads, block in ((2, 1, 1), (16, 8, 1), (1, 1, 2)):
        agree(draw((heads, kv_heads, block, 32, length + 3, [length, 5, 129]), dtype, device), tolerance=4)


def test_what_does_not_fit_is_marked_and_dropped(backend, device):
    arguments = draw((2, 1, 3, 8, 10, [8, 7, -1, 0, 10]), torch.float32, device)
    before = copies(arguments)
    out = ops.attend_cached(*arguments)
    bad = torch.tensor([True, False, True, False, True], device=device)
    assert out[bad].isnan().all()
    assert not out[~bad].isnan().any()
    assert arguments[5].tolist() == [8, 10, -1, 3, 10]
    for cache, old in zip(arguments[3:5], before[3:5], strict=True):
        torch.testing.assert_close(cache[bad], old[bad], rtol=0, atol=0, equal_nan=True)
    agree(before)


def test_crop_and_replay_gives_the_same_bits(backend, device):
    query, key, value, *caches, lengths = draw((4, 2, 1, 16, 200, [150, 3]), torch.float32, device)
    first = ops.attend_cached(query, key, value, *caches, lengths)
    for _ in range(3):
        ops.attend_cached(-query, 3 * key, value - 1, *caches, lengths)
    lengths.copy_(torch.tensor([150, 3]))
    assert torch.equal(ops.attend_cached(query, key, value, *caches, lengths), first)


def test_a_row_does_not_depend_on_its_batch(backend, device):
    length = 1200 if backend == "cpu" else 300
    arguments = draw((4, 2, 2, 24, length + 2, [5, length, 0, 140]), torch.float32, device)
    together = ops.attend_cached(*copies(arguments))
    order = torch.tensor([2, 0, 3, 1], device=device)
    assert torch.equal(ops.attend_cached(*(x[order] for x in arguments)), together[order])
    for b in range(4):
        alone = ops.attend_cached(*(x[b : b + 1].clone() for x in arguments))
        assert torch.equal(alone, together[b : b + 1])


@pytest.mark.usefixtures("four_threads")
def test_threads_do_not_change_a_bit(backend, device):
    if backend != "cpu":
        pytest.skip("one grid, however many threads")
    for shape in ((2, 1, 1, 64, 4096, [4000]), (8, 8, 3, 64, 2000, [1900, 700])):
        arguments = draw(shape, torch.bfloat16, device)
        results = []
        for threads in (1, 2, 3):
            _native.set_num_threads(threads)
            results.append(ops.attend_cached(*copies(arguments)))
        _native.set_num_threads(0)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_query_heads_share_key_heads_in_groups(backend, device):
    query, key, value, *caches, lengths = draw((6, 2, 2, 8, 30, [20, 4]), torch.float32, device)
    expected = ops.attend_cached(query, *(x.repeat_interleave(3, 1) for x in (key, value, *caches)), lengths.clone())
    close(ops.attend_cached(query, key, value, *caches, lengths), expected, scale=2)


def test_nan_stays_in_its_row_and_later_tokens_do_not_leak_back(backend, device):
    arguments = draw((2, 2, 4, 8, 20, [9, 5]), torch.float32, device)
    clean = ops.attend_cached(*copies(arguments))
    query, key, value, *_ = arguments
    value[0, :, 2] = math.inf
    key[0, 0, 3] = math.nan
    query[1, 1, 0] = math.nan
    out = ops.attend_cached(*arguments)
    touched = torch.zeros_like(out, dtype=torch.bool)
    touched[0, :, 2:] = touched[1, 1, 0] = True
    assert torch.equal(out[~touched], clean[~touched])
    assert out[0, 0, 3].isnan().all()
    assert out[1, 1, 0].isnan().all()
    assert (out[0, :, 2] == math.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_widens_exactly(backend, device, dtype):
    if backend != "cpu":
        pytest.skip("the other backends convert through PyTorch's own classes")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 1, -1)
    zeros = torch.zeros(1, 1, 1, every.shape[-1])
    # One key has all the weight, so the output is its value.
    out = ops.attend_cached(zeros, zeros, every, *(torch.zeros_like(every) for _ in range(2)),
                            torch.zeros(1, dtype=torch.int32))  # fmt: skip
    torch.testing.assert_close(out, every.float(), rtol=0, atol=0, equal_nan=True)


def test_is_as_accurate_as_float32_attention(backend, device):
    length = 900 if backend == "cpu" else 120
    query, key, value, *caches, lengths = draw((2, 2, 1, 64, length + 1, [length]), torch.float32, device)
    out = ops.attend_cached(3 * query, key, value, *caches, lengths)
    exact = scaled_dot_product_attention(3 * query.double(), *(c.double() for c in caches))
    theirs = scaled_dot_product_attention(3 * query, *caches)
    assert (out - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=8), st.integers(0, 2**16))
def test_a_cache_is_a_list_of_tokens(plan, seed):
    """Random blocks and crops on two samples, against attention over plain lists."""
    torch.manual_seed(seed)
    caches, lengths = [torch.full((2, 1, 12, 6), math.nan) for _ in range(2)], torch.zeros(2, dtype=torch.int32)
    tokens: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for block, crop in plan:
        query, key, value = (torch.randn(2, 1, block, 6) for _ in range(3))
        out = ops.attend_cached(query, key, value, *caches, lengths, scale=0.7)
        for b in range(2):
            if len(tokens[b]) + block > 12:
                assert out[b].isnan().all()
                continue
            for i in range(block):
                tokens[b].append((key[b, 0, i], value[b, 0, i]))
                keys, values = (torch.stack(x) for x in zip(*tokens[b], strict=True))
                close(out[b, 0, i], (0.7 * keys @ query[b, 0, i]).softmax(0) @ values, scale=4)
        del tokens[1][len(tokens[1]) - min(crop, len(tokens[1])) :]
        lengths[1] = len(tokens[1])
        assert lengths.tolist() == [len(tokens[0]), len(tokens[1])]


def test_empty_batches_and_blocks(backend, device):
    for batch, block in ((0, 1), (2, 0)):
        query = torch.randn(batch, 2, block, 4, device=device)
        caches = [torch.randn(batch, 2, 5, 4, device=device) for _ in range(2)]
        lengths = torch.full((batch,), 5, dtype=torch.int32, device=device)
        assert ops.attend_cached(query, query, query, *caches, lengths).shape == query.shape
        assert lengths.tolist() == [5] * batch


def test_arguments_count_as_constants(backend, device):
    query, key, value, *caches, lengths = draw((2, 2, 1, 8, 5, [2]), torch.float32, device)
    assert not ops.attend_cached(query.requires_grad_(), key, value.requires_grad_(), *caches, lengths).requires_grad
    assert lengths.item() == 3


REFUSALS = {
    "query has shape (2, 4, 8), but expected (batch, heads, block, width)": {"query": torch.zeros(2, 4, 8)},
    "query has 3 heads, but expected a multiple of the 2 heads of key_cache": {"query": torch.zeros(2, 3, 1, 8)},
    "key has shape (2, 2, 2, 8), but expected (2, 2, 1, 8)": {"key": torch.zeros(2, 2, 2, 8)},
    "value has shape (2, 1, 1, 8), but expected (2, 2, 1, 8)": {"value": torch.zeros(2, 1, 1, 8)},
    "value_cache has shape (2, 2, 6, 8), but expected (2, 2, 5, 8)": {"value_cache": torch.zeros(2, 2, 6, 8)},
    "lengths has shape (3,), but expected (2,)": {"lengths": torch.zeros(3, dtype=torch.int32)},
    "lengths has dtype torch.int64, but expected torch.int32": {"lengths": torch.zeros(2, dtype=torch.int64)},
    "key_cache has stride 5 in its last dimension": {"key_cache": torch.zeros(2, 2, 8, 5).transpose(2, 3)},
    "have dtypes torch.float64, torch.float32": {"query": torch.zeros(2, 4, 1, 8, dtype=torch.float64)},
    "none of the last three 0": {"key_cache": torch.zeros(2, 2, 0, 8)},
    "value is on meta, but expected cpu": {"value": torch.zeros(2, 2, 1, 8, device="meta")},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refuses_in_one_sentence(message):
    arguments = {
        "query": torch.zeros(2, 4, 1, 8), "key": torch.zeros(2, 2, 1, 8), "value": torch.zeros(2, 2, 1, 8),
        "key_cache": torch.zeros(2, 2, 5, 8), "value_cache": torch.zeros(2, 2, 5, 8),
        "lengths": torch.zeros(2, dtype=torch.int32),
    }  # fmt: skip
    ops.attend_cached(**arguments)
    assert arguments["lengths"].tolist() == [1, 1]
    with pytest.raises((ValueError, TypeError)) as error:
        ops.attend_cached(**{**arguments, **REFUSALS[message]})
    assert message in str(error.value)
    assert arguments["lengths"].tolist() == [1, 1]


@pytest.mark.parametrize("changed", ["lengths", "key_cache", "value_cache"])
def test_refuses_to_change_what_shares_memory(backend, device, namespace, changed):
    names = ("query", "key", "value", "key_cache", "value_cache", "lengths")
    arguments = dict(zip(names, draw((4, 2, 1, 8, 9, [3, 3]), torch.float32, device), strict=True))
    whole = arguments[changed]
    operator = getattr(torch.ops, namespace).attend_cached.default
    for dimension in range(min(whole.dim(), 3)):
        shared = {**arguments, changed: whole.narrow(dimension, 0, 1).expand_as(whole)}
        sentence = f"{changed} has stride 0 in dimension {dimension}, but expected memory of its own"
        with pytest.raises(ValueError, match=sentence):
            ops.attend_cached(**shared)
        with pytest.raises(RuntimeError, match=sentence):
            operator(**shared, scale=1.0)
    # One element shares with none, whatever its stride.
    alone = {name: tensor[:1, :, :1] if tensor.dim() == 4 else tensor[:1] for name, tensor in arguments.items()}
    alone |= {name: arguments[name][:1] for name in ("key_cache", "value_cache")}
    alone[changed] = alone[changed].as_strided(alone[changed].shape, (0, *alone[changed].stride()[1:]))
    assert ops.attend_cached(**alone).isfinite().all()


def test_raw_operator_refuses_another_device(backend, device, namespace):
    if backend != "cuda":
        pytest.skip("two devices are needed")
    names = ("query", "key", "value", "key_cache", "value_cache", "lengths")
    arguments = dict(zip(names, draw((4, 2, 1, 8, 9, [3, 3]), torch.float32, device), strict=True))
    for name in names[1:]:
        with pytest.raises(RuntimeError, match=f"{name} is on another device than query"):
            torch.ops.pygen.attend_cached(**{**arguments, name: arguments[name].cpu()}, scale=1.0)


def test_unwritten_output_would_show(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        # What the operator allocates holds NaN, so what it leaves out of its splits or of its output would be seen.
        for dtype in DTYPES:
            for shape in (*SHAPES, (4, 2, 1, 32, 700, [690, 0, 5, 129]), (2, 1, 3, 24, 400, [390, 1, 128])):
                arguments = draw(shape, dtype, device)
                lengths = arguments[5].tolist()
                out = ops.attend_cached(*arguments)
                assert out.isfinite().all()
                for cache in arguments[3:5]:
                    for b, length in enumerate(lengths):
                        assert cache[b, :, : length + shape[2]].isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_raw_operator_passes_opcheck(backend, device, namespace):
    operator = getattr(torch.ops, namespace).attend_cached.default
    query, key, value, *caches, lengths = draw((4, 2, 2, 8, 9, [3, 0]), torch.float32, device)
    caches = [cache.nan_to_num() for cache in caches]
    opcheck(operator, (query, key, value, *caches, lengths, 0.3))
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    opcheck(operator, (query, key, value, *caches, lengths, 1.0))


def test_compiles_in_one_graph(backend, device):
    arguments = draw((4, 2, 2, 8, 9, [3, 0]), torch.float32, device)
    ours, theirs = copies(arguments), copies(arguments)

    def step(*tensors: Tensor) -> Tensor:
        return ops.attend_cached(tensors[0] * 2, *tensors[1:]) + 1

    close(torch.compile(step, fullgraph=True)(*ours), step(*theirs))
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True)


def test_graph_replay(backend, device):
    if backend != "cuda":
        pytest.skip("graphs are captured on a GPU only")
    query, key, value, *caches, lengths = draw((8, 2, 1, 64, 300, [100, 7]), torch.bfloat16, device)
    ops.attend_cached(query, key, value, *(c.clone() for c in caches), lengths.clone())
    twins, twin_lengths = [c.clone() for c in caches], lengths.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attend_cached(query, key, value, *caches, lengths)
    for _ in range(3):
        query.normal_(), key.normal_()
        graph.replay()
        assert torch.equal(out, ops.attend_cached(query, key, value, *twins, twin_lengths))
    assert lengths.tolist() == [103, 10]


@pytest.mark.large
def test_index_arithmetic_past_2_31(backend, device):
    capacity, width = 2**20, 128
    caches = [torch.zeros(17, 1, capacity, width, dtype=torch.float16, device=device) for _ in range(2)]
    lengths = torch.full((17,), capacity - 1, dtype=torch.int32, device=device)
    query, key = (torch.full((17, 1, 1, width), x, dtype=torch.float16, device=device) for x in (8.0, 8.0))
    value = torch.arange(17, device=device).half().view(17, 1, 1, 1).expand_as(key)
    # The one key that is not zero has all the weight.
    out = ops.attend_cached(query, key, value, *caches, lengths)
    assert torch.equal(out[:, 0, 0, 0].float(), torch.arange(17, device=device).float())
