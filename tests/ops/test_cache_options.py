"""Cached attention with 8-bit storage, pages, windows, sinks, masks and rotary embedding, each and together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import DTYPES, close, opcheck
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pygen import _native, ops
from pygen.ops.cache_reference import quantize

CODES = (torch.int8, torch.float8_e4m3fn)


def plain(x: Tensor) -> Tensor:
    return x.view(torch.int8) if x.dtype == torch.float8_e4m3fn else x


def copies(x: Any) -> Any:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in x.items()}


def tables(rows: int, pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of no regular angles, so that no mistake in them cancels."""
    angle = 6 * torch.rand(rows, pairs, dtype=torch.float64, device=device)
    return angle.cos(), angle.sin()


def stored(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A cache of a storage dtype, and its scales."""
    if dtype not in CODES:
        return x.to(dtype), None
    codes, scales = quantize(x.float(), dtype)
    return codes, scales


def problem(
    lengths: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    block: int = 1,
    width: int = 16,
    capacity: int = 40,
    dtype: torch.dtype = torch.float32,
    storage: torch.dtype | None = None,
    page_size: int | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """The tensors of a call. Pages of a sequence lie in disorder, and one more page belongs to nobody."""
    batch = len(lengths)
    query = torch.randn(batch, heads, block, width, device=device).to(dtype)
    key, value = (torch.randn(batch, kv_heads, block, width, device=device).to(dtype) for _ in range(2))
    shape, pages = (batch, kv_heads, capacity, width), None
    if page_size is not None:
        columns = -(-capacity // page_size)
        shape = (batch * columns + 1, kv_heads, page_size, width)
        pages = torch.randperm(batch * columns + 1, device=device)[:-1].int().view(batch, columns)
    (key_cache, key_scales), (value_cache, value_scales) = (
        stored(torch.randn(shape, device=device), storage or dtype) for _ in range(2)
    )
    return {
        "query": query, "key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache,
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=device), "key_scales": key_scales,
        "value_scales": value_scales, "pages": pages,
    }  # fmt: skip


def agree(arguments: dict[str, Any], *, tolerance: float = 4.0, exact: bool = True) -> Tensor:
    """The operator and its reference give the same output and leave the same caches; the output."""
    ours, theirs = copies(arguments), copies(arguments)
    out, expected = ops.attend_cached(**ours), ops.attend_cached_reference(**theirs)
    close(out, expected, scale=tolerance)
    for name in ("lengths", "key_cache", "value_cache", "key_scales", "value_scales"):
        mine, wanted = ours[name], theirs[name]
        if mine is None:
            continue
        if exact or not mine.is_floating_point():
            torch.testing.assert_close(plain(mine), plain(wanted), rtol=0, atol=0 if exact else 1, equal_nan=True)
        else:
            close(mine.float(), wanted.float(), scale=tolerance * 1e5 if mine.dtype in CODES else tolerance)
    return out


def rotary(device: torch.device, **options: Any) -> ops.Rotary:
    return ops.Rotary(*tables(200, options.pop("pairs", 8), device), **options)


# On CUDA the products of a rotation may be fused with their sum, which no other backend does.
def rounds_alike(backend: str) -> bool:
    return backend != "cuda"


@pytest.mark.parametrize("storage", CODES)
def test_codes_equal_the_reference(backend, device, storage):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (1, 7, 64, 130, 300):
            agree(problem([0, 33, 38], width=width, block=2, dtype=dtype, storage=storage, device=device))
    agree(problem([600, 3], capacity=610, storage=storage, device=device, block=5, heads=8))


@pytest.mark.parametrize("storage", CODES)
def test_codes_are_as_near_as_is_said(backend, device, storage):
    scales_of_rows = torch.logspace(-20, 20, 64, device=device).view(1, 1, -1, 1)
    key, value = (torch.randn(1, 1, 64, 48, device=device) * scales_of_rows for _ in range(2))
    arguments = problem([0], heads=1, kv_heads=1, width=48, capacity=64, storage=storage, device=device)
    names = ("key_cache", "value_cache", "lengths", "key_scales", "value_scales")
    ops.append_cached(key, value, **{name: arguments[name] for name in names})
    assert arguments["lengths"].item() == 64
    for x, codes, scale in (
        (key, arguments["key_cache"], arguments["key_scales"]),
        (value, arguments["value_cache"], arguments["value_scales"]),
    ):
        largest = x.abs().amax(-1)
        close(scale / largest, torch.full_like(scale, 1 / (127 if storage == torch.int8 else 448)))
        error = (codes.double() * scale.double().unsqueeze(-1) - x.double()).abs()
        if storage == torch.int8:
            bound = scale.unsqueeze(-1).expand_as(x) / 2
        else:
            bound = torch.maximum(x.abs() / 16, scale.unsqueeze(-1) * 2.0**-10)
        assert (error <= bound.double() * (1 + 1e-5)).all()
        # The largest element of a row is kept as the largest code.
        assert (codes.float().abs().amax(-1) == (127 if storage == torch.int8 else 448)).all()


@pytest.mark.parametrize("storage", CODES)
def test_every_code_is_read_as_pytorch_reads_it(backend, device, storage):
    every = torch.arange(256, dtype=torch.uint8, device=device).view(storage)
    every = every.float()[every.float().isfinite()].to(storage).view(1, 1, 1, -1)
    zeros = torch.zeros(every.shape, device=device)
    lengths, ones = torch.ones(1, dtype=torch.int32, device=device), torch.ones(1, 1, 1, device=device)
    out = ops.attend_cached(
        zeros, None, None, zeros.to(storage), every.clone(), lengths, key_scales=ones, value_scales=ones / 2
    )
    torch.testing.assert_close(out, every.float() / 2, rtol=0, atol=0)
    assert lengths.item() == 1


@pytest.mark.parametrize("storage", CODES)
def test_rows_that_have_no_scale(backend, device, storage):
    arguments = problem([0], heads=1, kv_heads=1, block=6, width=4, capacity=6, storage=storage, device=device)
    value = arguments["value"]
    value[0, 0, 0] = 0
    value[0, 0, 1] = torch.tensor([0, 1e-40, -1e-39, 0])
    value[0, 0, 2, 1] = math.inf
    value[0, 0, 3, 2] = math.nan
    arguments["key"].zero_()
    theirs = copies(arguments)
    out = ops.attend_cached(**arguments)
    theirs.pop("query")
    ops.append_cached_reference(**theirs)
    for name in ("value_cache", "value_scales"):
        torch.testing.assert_close(plain(arguments[name]), plain(theirs[name]), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out[0, 0, :2], torch.zeros_like(out[0, 0, :2]))
    assert out[0, 0, 2:].isnan().all()


@pytest.mark.parametrize("page_size", [1, 4, 64])
def test_pages_equal_one_piece(backend, device, page_size):
    for storage in (torch.float32, torch.bfloat16, *CODES):
        for block in (1, 5):
            arguments = problem(
                [0, 31, 130], block=block, capacity=140, storage=storage, page_size=page_size, device=device
            )
            out = agree(arguments)
            pages = arguments["pages"].long()

            def joined(x: Tensor, pages: Tensor = pages) -> Tensor:
                return plain(x)[pages].transpose(1, 2).flatten(2, 3).contiguous().view(x.dtype)

            whole = {name: joined(arguments[name]) for name in ("key_cache", "value_cache")}
            if storage in CODES:
                whole |= {name: joined(arguments[name]) for name in ("key_scales", "value_scales")}
            assert torch.equal(ops.attend_cached(**{**copies(arguments), **whole, "pages": None}), out)


def test_a_page_that_does_not_exist_marks_its_row_alone(backend, device):
    for bad, column in ((-1, 0), (99, 1), (-1, 2)):
        arguments = problem([17, 17, 3], block=2, capacity=40, page_size=8, device=device)
        arguments["pages"][1, column] = bad
        before = copies(arguments)
        out = agree(arguments)
        ops.attend_cached(**arguments)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()
        assert arguments["lengths"].tolist() == [19, 17, 5]
        nobody = [page for page in range(16) if page not in before["pages"][[0, 2]]]
        assert torch.equal(arguments["key_cache"][nobody], before["key_cache"][nobody])
    # What is not read may be anything.
    arguments = problem([17], block=2, capacity=40, page_size=8, device=device)
    arguments["pages"][0, 3:] = -1
    assert agree(arguments).isfinite().all()
    arguments["pages"][0, 0] = -1
    assert agree({**arguments, "window": 5}).isfinite().all()
    assert agree({**arguments, "window": 5, "sinks": 1}).isnan().all()


@settings(max_examples=40)
@given(st.data())
def test_a_ring_holds_the_window_and_the_sinks(data):
    """Random blocks and small crops against attention over a plain list of tokens."""
    window, sinks, slack = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 5)), data.draw(st.integers(0, 4))
    capacity = sinks + window + slack
    torch.manual_seed(data.draw(st.integers(0, 99)))
    caches, lengths = [torch.full((1, 1, capacity, 6), math.nan) for _ in range(2)], torch.zeros(1, dtype=torch.int32)
    tokens: list[tuple[Tensor, Tensor]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        block = data.draw(st.integers(1, slack + 1))
        query, key, value = (torch.randn(1, 1, block, 6) for _ in range(3))
        out = ops.attend_cached(query, key, value, *caches, lengths, window=window, sinks=sinks)
        for i in range(block):
            tokens.append((key[0, 0, i], value[0, 0, i]))
            seen = [j for j in range(len(tokens)) if j < sinks or j > len(tokens) - 1 - window]
            keys, values = (torch.stack([tokens[j][x] for j in seen]) for x in range(2))
            close(out[0, 0, i], (keys @ query[0, 0, i] / 6**0.5).softmax(0) @ values, scale=4)
        if len(tokens) <= capacity:
            del tokens[len(tokens) - data.draw(st.integers(0, 2)) if len(tokens) > 2 else len(tokens) :]
            lengths[0] = len(tokens)
        assert lengths.item() == len(tokens)


def test_windows_equal_the_reference(backend, device):
    for window, sinks, block, capacity in ((1, 0, 1, 1), (5, 2, 1, 7), (130, 140, 3, 280), (300, 4, 5, 400)):
        for lengths in ([0, 1, 2], [6, 150, 999]):
            for storage in (torch.float32, torch.int8):
                arguments = problem(lengths, block=block, capacity=capacity, storage=storage, device=device)
                agree({**arguments, "window": window, "sinks": sinks})
                paged = problem(lengths, block=block, capacity=1010, page_size=16, storage=storage, device=device)
                agree({**paged, "window": window, "sinks": sinks})


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 4, 2, 40), (1, 1, 1, 36), (3, 1, 2, 50), (1, 4, 1, 9)])
def test_masks_equal_the_reference(backend, device, kind, shape):
    mask = torch.randn(shape, device=device)
    mask = mask > -0.3 if kind == torch.bool else torch.where(mask > -0.5, mask, -math.inf).to(kind)
    arguments = problem([0, 20, 35], block=2, device=device)
    for options in ({}, {"causal": False}, {"window": 7, "sinks": 2}):
        agree({**arguments, "mask": mask, **options})
    wide = torch.stack((mask, mask), -1).transpose(0, 2).contiguous().transpose(0, 2)[..., 0]  # of other strides
    assert torch.equal(
        ops.attend_cached(**copies(arguments), mask=wide), ops.attend_cached(**copies(arguments), mask=mask)
    )


def test_a_left_padded_batch_is_its_rows_alone(backend, device):
    """Padding has no effect, whatever is in it, and rows of padding give 0."""
    query, key, value = (torch.randn(2, heads, 7, 8, device=device) for heads in (4, 2, 2))
    padding = torch.tensor([3, 0], device=device)
    key[0, :, :3] = math.nan
    value[0, :, :3] = math.inf
    mask = (torch.arange(9, device=device) >= padding.unsqueeze(1)).view(2, 1, 1, 9)
    caches = [torch.full((2, 2, 9, 8), math.nan, device=device) for _ in range(2)]
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    out = torch.cat(
        [
            ops.attend_cached(*(x[:, :, part] for x in (query, key, value)), *caches, lengths, mask=mask)
            for part in (slice(0, 5), slice(5, 6), slice(6, 7))
        ],
        dim=2,
    )
    assert torch.equal(out[0, :, :3], torch.zeros_like(out[0, :, :3]))
    expected = scaled_dot_product_attention(
        *(x[:1, :, 3:] for x in (query, key, value)), is_causal=True, enable_gqa=True
    )
    close(out[:1, :, 3:], expected, scale=4)
    close(
        out[1:], scaled_dot_product_attention(query[1:], key[1:], value[1:], is_causal=True, enable_gqa=True), scale=4
    )


def test_additive_masks_at_the_end_of_their_range(backend, device):
    """The least finite number, as transformers adds it, and a sum that overflows."""
    arguments = problem([6], heads=1, kv_heads=1, capacity=8, device=device)
    least = torch.finfo(torch.float32).min
    mask = torch.zeros(1, 1, 1, 8, device=device)
    mask[..., :3] = least
    out = agree({**arguments, "mask": mask})
    hidden = torch.arange(8, device=device).view(1, 1, 1, 8) >= 3
    assert torch.equal(ops.attend_cached(**copies(arguments), mask=hidden), out)
    # Each score is finite, and its sum with the mask is not.
    for name, number in (("query", 1e18), ("key", -1e19), ("key_cache", -1e19)):
        arguments[name].fill_(number)
    assert torch.equal(agree({**arguments, "mask": torch.full_like(mask, least)}), torch.zeros_like(out))


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [8, 6])
def test_rotary_equals_the_reference(backend, device, interleaved, axes, pairs):
    exact = rounds_alike(backend)
    for dtype in DTYPES:
        turning = rotary(device, pairs=pairs, interleaved=interleaved, axes=axes)
        arguments = problem([0, 9, 30], block=3, dtype=dtype, device=device)
        agree({**arguments, "rotary": turning}, exact=exact)
        for kind in (torch.int32, torch.int64):
            positions = torch.randint(0, 200, (3, 3), dtype=kind, device=device)
            agree({**arguments, "rotary": turning._replace(positions=positions)}, exact=exact)
            agree({**arguments, "rotary": turning._replace(positions=positions[:1])}, exact=exact)
    for storage in CODES:
        agree({**problem([5, 7], storage=storage, device=device), "rotary": turning}, exact=exact)


def test_rotary_is_that_of_the_papers(backend, device):
    """Pairs as complex numbers, turned by position times frequency (Su et al., eq. 34); pictures an axis at a time."""
    width, length = 16, 12
    query, key, value = (torch.randn(1, 1, length, width, device=device) for _ in range(3))
    frequency = 10_000.0 ** -(torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
    angle = torch.arange(length, device=device).unsqueeze(1) * frequency
    rows, columns = torch.arange(length, device=device) // 4, torch.arange(length, device=device) % 4
    quarter = 10_000.0 ** -(torch.arange(0, width // 2, 2, device=device, dtype=torch.float64) / (width // 2))
    both = torch.cat((rows.unsqueeze(1) * quarter, columns.unsqueeze(1) * quarter), 1)

    def turned(x: Tensor, angle: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).float()

    def cached(turning: ops.Rotary) -> Tensor:
        caches = [torch.zeros(1, 1, length, width, device=device) for _ in range(2)]
        return ops.attend_cached(
            query, key, value, *caches, torch.zeros(1, dtype=torch.int32, device=device), rotary=turning
        )

    for angles, axes, made in (
        (angle, 1, ops.rotary_tables(length, width, device=device)),
        (both, 2, ops.rotary_tables_2d(3, 4, width, device=device)),
    ):
        expected = scaled_dot_product_attention(turned(query, angles), turned(key, angles), value, is_causal=True)
        close(cached(ops.Rotary(*made, interleaved=True, axes=axes)), expected, scale=10)


def test_half_split_rotary_is_that_of_transformers(backend, device):
    """q cos + rotate_half(q) sin, with tables of the whole width for the new tokens alone."""
    query, key, value = (torch.randn(2, 2, 3, 8, device=device) for _ in range(3))
    cos, sin = torch.rand(2, 3, 4, device=device).repeat(1, 1, 2), torch.rand(2, 3, 4, device=device).repeat(1, 1, 2)

    def turned(x: Tensor) -> Tensor:
        rotated = torch.cat((-x[..., 4:], x[..., :4]), -1)
        return x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)

    caches = [torch.zeros(2, 2, 5, 8, device=device) for _ in range(2)]
    turning = ops.Rotary(
        cos[..., :4].reshape(-1, 4), sin[..., :4].reshape(-1, 4), torch.arange(6, device=device).view(2, 3)
    )
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    out = ops.attend_cached(query, key, value, *caches, lengths, rotary=turning)
    close(out, scaled_dot_product_attention(turned(query), turned(key), value, is_causal=True), scale=4)
    close(caches[0][:, :, :3], turned(key), scale=2)


@pytest.mark.parametrize("sink_positions", ["cache", "absolute"])
def test_where_rotary_has_the_sinks(backend, device, sink_positions):
    """In a long stream, against keys that are turned anew at every step by their places among those that are kept."""
    window, sinks, width, length = 5, 2, 8, 30
    query, key, value = (torch.randn(1, 1, length, width, device=device) for _ in range(3))
    cos, sin = ops.rotary_tables(length, width, device=device)
    caches = [torch.zeros(1, 1, window + sinks, width, device=device) for _ in range(2)]
    lengths = torch.zeros(1, dtype=torch.int32, device=device)

    def turned(x: Tensor, places: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos[places], sin[places])).flatten(-2)

    for i in range(length):
        out = ops.attend_cached(
            *(x[:, :, i : i + 1] for x in (query, key, value)), *caches, lengths, window=window, sinks=sinks,
            sink_positions=sink_positions, rotary=ops.Rotary(cos, sin, interleaved=True),
        )  # fmt: skip
        kept = torch.tensor([j for j in range(i + 1) if j < sinks or j > i - window], device=device)
        places = torch.arange(len(kept), device=device) if sink_positions == "cache" else kept
        expected = scaled_dot_product_attention(
            turned(query[:, :, i : i + 1], places[-1:]), turned(key[:, :, kept], places), value[:, :, kept]
        )
        close(out, expected, scale=10)


def test_positions_outside_the_table_mark_their_row(backend, device):
    turning = ops.Rotary(*tables(20, 8, device))
    arguments = problem([18, 19, 3], block=2, device=device)
    out = agree({**arguments, "rotary": turning}, exact=rounds_alike(backend))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    positions = torch.tensor([[0, 19], [0, 20], [-1, 0]], device=device)
    out = agree({**arguments, "rotary": turning._replace(positions=positions)}, exact=rounds_alike(backend))
    assert out[0].isfinite().all()
    assert out[1:].isnan().all()


@settings(max_examples=60)
@given(st.data())
def test_everything_together_equals_the_reference(data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    kv_heads, group, block = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    width = data.draw(st.sampled_from([2, 8, 12, 36]))
    window = data.draw(st.sampled_from([None, 1, 3, 17]))
    sinks = 0 if window is None else data.draw(st.integers(0, 3))
    least = block if window is None else sinks + window + block - 1
    capacity = least + data.draw(st.integers(0, 40))
    page_size = data.draw(st.sampled_from([None, 2, 8]))
    top = capacity - block if window is None or page_size else 3 * capacity
    lengths = data.draw(st.lists(st.integers(-1, top + 1), min_size=1, max_size=3))
    arguments = problem(
        lengths, heads=kv_heads * group, kv_heads=kv_heads, block=block, width=width, capacity=capacity,
        storage=data.draw(st.sampled_from([torch.float32, torch.bfloat16, *CODES])), page_size=page_size,
    )  # fmt: skip
    if data.draw(st.booleans()):
        shape = [data.draw(st.sampled_from([1, size])) for size in (len(lengths), kv_heads * group, block)]
        mask = torch.randn(*shape, data.draw(st.integers(1, 2 * capacity)))
        arguments["mask"] = mask > 0 if data.draw(st.booleans()) else torch.where(mask > 0, mask, -math.inf)
    if data.draw(st.booleans()):
        arguments["rotary"] = ops.Rotary(
            *tables(4 * capacity, width // 2 // 2 * 2 or 1, torch.device("cpu")),
            interleaved=data.draw(st.booleans()), axes=data.draw(st.sampled_from([1, 2])) if width > 2 else 1,
        )  # fmt: skip
    options = {"window": window, "sinks": sinks, "causal": data.draw(st.booleans()),
               "sink_positions": data.draw(st.sampled_from(["cache", "absolute"]))}  # fmt: skip
    agree({**arguments, **options})


def test_attending_alone_equals_appending_and_attending(backend, device):
    for storage in (torch.float32, torch.int8):
        for options in ({}, {"window": 20, "sinks": 3}):
            arguments = problem([3, 25], block=4, storage=storage, device=device)
            together = copies(arguments)
            out = ops.attend_cached(**together, **options)
            apart = copies(arguments)
            query = apart.pop("query")
            ops.append_cached(**apart, **options)
            for name in ("key_cache", "value_cache", "lengths"):
                assert torch.equal(plain(apart[name]), plain(together[name]))
            assert torch.equal(ops.attend_cached(query, **{**apart, "key": None, "value": None}, **options), out)
            assert torch.equal(apart["lengths"], together["lengths"])


def test_append_alone_equals_its_reference(backend, device):
    for options in ({}, {"rotary": rotary(device)}, {"window": 7, "sinks": 2}):
        for storage in (torch.float64, torch.bfloat16, torch.int8):
            dtype = torch.float64 if storage == torch.float64 else torch.float32
            ours = problem([5, 39, -1, 12], block=3, dtype=dtype, storage=storage, device=device)
            ours.pop("query")
            theirs = copies(ours)
            assert ops.append_cached(**ours, **options) is None
            ops.append_cached_reference(**theirs, **options)
            assert (
                ours["lengths"].tolist() == theirs["lengths"].tolist() == [8, 42 if "window" in options else 39, -1, 15]
            )
            for name in ("key_cache", "value_cache"):
                if rounds_alike(backend):
                    assert torch.equal(plain(ours[name]), plain(theirs[name]))
                else:
                    close(ours[name].float(), theirs[name].float(), scale=1e4)


def test_a_row_does_not_depend_on_its_batch_or_on_threads(backend, device):
    arguments = problem([700, 3, 512, 40], capacity=704, block=2, storage=torch.int8, page_size=16, device=device)
    arguments |= {"mask": torch.rand(4, 1, 2, 704, device=device) > 0.2, "rotary": ops.Rotary(*tables(704, 8, device))}
    arguments |= {"window": 600, "sinks": 5}
    together = ops.attend_cached(**copies(arguments))
    for b in range(4):
        row = {name: arguments[name][b : b + 1] for name in ("query", "key", "value", "lengths", "pages", "mask")}
        assert torch.equal(ops.attend_cached(**copies({**arguments, **row})), together[b : b + 1])


@pytest.mark.usefixtures("four_threads")
def test_threads_do_not_change_a_bit(backend, device):
    if backend != "cpu":
        pytest.skip("one grid, however many threads")
    arguments = problem([2000], heads=2, kv_heads=1, capacity=2001, storage=torch.float8_e4m3fn, device=device)
    arguments |= {"window": 1900, "sinks": 5, "rotary": ops.Rotary(*tables(2001, 8, device))}
    results = []
    for threads in (1, 2, 3):
        _native.set_num_threads(threads)
        results.append(ops.attend_cached(**copies(arguments)))
    _native.set_num_threads(0)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_unwritten_output_would_show(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        for window, sinks in ((None, 0), (30, 200), (200, 3)):
            arguments = problem([0, 5, 260], capacity=1024, page_size=16, block=2, storage=torch.int8, device=device)
            assert ops.attend_cached(**arguments, window=window, sinks=sinks).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_raw_operators_pass_opcheck(backend, device, namespace):
    operators = getattr(torch.ops, namespace)
    cos, sin = (table.float() for table in tables(60, 8, device))
    for storage in (torch.float32, torch.int8):
        x = problem([3, 0], block=2, page_size=8, storage=storage, device=device)
        x |= {"cos": cos, "sin": sin, "positions": torch.tensor([[3, 4]], device=device), "window": 5, "sinks": 1}
        opcheck(operators.attend_cached.default, (), {**x, "scale": 0.3, "mask": torch.ones(1, 1, 2, 9, device=device)})
        x.pop("query")
        opcheck(operators.append_cached.default, (), x)


def test_compiles_in_one_graph(backend, device):
    x = problem([3, 0], storage=torch.int8, page_size=8, block=2, device=device)
    mask, turning = torch.rand(2, 1, 2, 40, device=device) > 0.3, rotary(device)
    ours, theirs = copies(x), copies(x)

    def step(x: dict[str, Any]) -> Tensor:
        ops.append_cached(x["key"], x["value"], **{name: x[name] for name in kept}, rotary=turning)
        return ops.attend_cached(**x, mask=mask, rotary=turning, window=9, sinks=2) + 1

    kept = ("key_cache", "value_cache", "lengths", "key_scales", "value_scales", "pages")
    close(torch.compile(step, fullgraph=True)(ours), step(theirs), scale=4)
    for name in kept:
        torch.testing.assert_close(ours[name], theirs[name])


REFUSALS = {
    "value is None, but expected key and value together": {"value": None},
    "key_scales is None, but expected it with caches of int8": {"key_scales": None},
    "value_scales is torch.float64 of shape (2, 2, 40), but expected torch.float32 of shape (2, 2, 40)": {
        "value_scales": torch.zeros(2, 2, 40, dtype=torch.float64)
    },
    "key_scales has stride 0, but expected memory of its own": {"key_scales": torch.zeros(2, 2, 1).expand(2, 2, 40)},
    "sinks is 2, but expected 0 without a window": {"sinks": 2},
    "window is 0 and sinks is 0, but expected at least 1": {"window": 0},
    "sink_positions is 'here', but expected 'cache' or 'absolute'": {"sink_positions": "here", "window": 1},
    "key_cache has a capacity of 40, but expected at least sinks + window + block - 1 = 41": {"window": 39, "sinks": 2},
    "mask has shape (2, 3, 1, 40), but expected (2 or 1, 4 or 1, 1 or 1, positions)": {
        "mask": torch.zeros(2, 3, 1, 40)
    },
    "mask has dtype torch.int64, but expected torch.bool or a floating dtype": {
        "mask": torch.zeros(1, 1, 1, 40, dtype=torch.int64)
    },
    "pages is torch.int64 of shape (2, 5), but expected torch.int32 of shape (2, pages": {
        "pages": torch.zeros(2, 5, dtype=torch.int64)
    },
    "key_cache has pages of 40 tokens, but expected a power of two": {"pages": torch.zeros(2, 1, dtype=torch.int32)},
    "rotary has cos of shape (9, 9) and sin of shape (9, 9), but expected both (positions, at most 8)": {
        "rotary": ops.Rotary(torch.zeros(9, 9), torch.zeros(9, 9))
    },
    "rotary has 2 axes and 7 pairs, but expected 1, or 2 with an even number": {
        "rotary": ops.Rotary(torch.zeros(9, 7), torch.zeros(9, 7), axes=2)
    },
    "rotary has positions of torch.float32 of shape (2, 1), but expected int32 or int64 of shape (2 or 1, 1)": {
        "rotary": ops.Rotary(torch.zeros(9, 8), torch.zeros(9, 8), torch.zeros(2, 1))
    },
    "mask is on meta, but expected cpu": {"mask": torch.zeros(1, 1, 1, 40, device="meta")},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refuses_in_one_sentence(message):
    arguments = problem([3, 4], storage=torch.int8)
    ops.attend_cached(**arguments)
    with pytest.raises((ValueError, TypeError)) as error:
        ops.attend_cached(**{**arguments, **REFUSALS[message]})
    assert message in str(error.value)
    assert arguments["lengths"].tolist() == [4, 5]


def test_raw_operators_refuse_too(backend, device, namespace):
    operator = getattr(torch.ops, namespace).attend_cached.default
    for message, wrong in {
        "key_scales is missing": {"key_scales": None},
        "key and value are to be given together": {"value": None},
        "sinks only with a window": {"sinks": 2},
        "expected at least sinks": {"window": 40, "sinks": 2},
        "mask has shape": {"mask": torch.zeros(2, 3, 1, 40, device=device)},
        "mask has a dtype": {"mask": torch.zeros(1, 1, 1, 40, dtype=torch.int64, device=device)},
        "pages has shape": {"pages": torch.zeros(2, 5, dtype=torch.int64, device=device)},
        "cos has shape": {"cos": torch.zeros(9, 9, device=device), "sin": torch.zeros(9, 9, device=device)},
        "cos must have the dtype": {
            "cos": torch.zeros(9, 8, device=device).half(),
            "sin": torch.zeros(9, 8, device=device),
        },
        "axes is 3": {"cos": torch.zeros(9, 8, device=device), "sin": torch.zeros(9, 8, device=device), "axes": 3},
    }.items():
        arguments = problem([3, 4], storage=torch.int8, device=device)
        with pytest.raises(RuntimeError, match=message):
            operator(**{**arguments, **wrong}, scale=1.0)
        assert arguments["lengths"].tolist() == [3, 4]
