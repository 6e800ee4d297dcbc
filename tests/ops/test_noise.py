"""Addressed noise: equal to its reference in every bit, a function of its address alone, and normal or uniform."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import DTYPES, opcheck
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pygen import _native, ops
from pygen.ops.noise import NORMAL_STREAM, UNIFORM_STREAM, philox_reference, philox_uniform_reference

BOTH = [(ops.noise, ops.noise_reference), (ops.uniform, ops.uniform_reference)]
SHAPES = [(), (1,), (3,), (4,), (8,), (2, 5, 7), (0,), (3, 0), (1027,), (4100,)]


def ids_on(device: torch.device) -> torch.Tensor:
    return torch.tensor([0, 5, -3, 2**62, 2**32], device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("function", "reference"), BOTH)
def test_equals_the_reference_in_every_bit(backend, device, function, reference, dtype):
    ids = ids_on(device)
    per_sample = torch.tensor([3, -1, 2**40, 0, -(2**63)], device=device)
    addresses = [
        {"seed": 3},
        {"seed": 2**64 - 1, "draw": 2**30 - 1},
        {"seed": torch.tensor(-7, device=device), "draw": torch.tensor(9, device=device)},
        {"seed": per_sample, "draw": per_sample.abs() % 2**31},
    ]
    for shape in SHAPES:
        for address in addresses:
            actual = function(ids, shape, dtype=dtype, **address)
            assert actual.dtype == dtype
            assert actual.shape == (5, *shape)
            assert torch.equal(actual, reference(ids, shape, dtype=dtype, **address))


@pytest.mark.parametrize(("function", "reference"), BOTH)
def test_long_rows_and_many_rows(backend, device, function, reference):
    width = 70_003 if backend != "simt" else 9_001
    for n, shape in ((2, (width,)), (width, ())):
        ids = torch.arange(n, device=device) - 7
        assert torch.equal(function(ids, shape, seed=5), reference(ids, shape, seed=5))


def test_dtypes_are_roundings_of_the_same_numbers(backend, device):
    ids = ids_on(device)
    for function in (ops.noise, ops.uniform):
        narrow = function(ids, (33,), seed=1)
        for dtype in DTYPES:
            assert torch.equal(function(ids, (33,), seed=1, dtype=dtype), narrow.to(dtype))


def test_a_seed_means_these_numbers_for_ever(backend, device):
    ids = torch.tensor([0, 12345678901], device=device)
    bits = ops.noise(ids, (5,), seed=20, draw=3).view(torch.int32).tolist()
    assert bits == GOLDEN_NORMAL
    assert ops.uniform(ids, (5,), seed=20, draw=3).view(torch.int32).tolist() == GOLDEN_UNIFORM


def test_numbers_of_numpy(backend, device):
    ids = ids_on(device)
    for function in (ops.noise, ops.noise_reference):
        actual = function(ids, (5,), seed=np.uint64(2**64 - 1), draw=np.int32(3))
        assert torch.equal(actual, function(ids, (5,), seed=-1, draw=3))


GOLDEN_NORMAL = [
    [1065611847, 1057883531, 1051990975, -1093142981, 1067087996],
    [1071578488, -1079236818, 1071929489, 1070256105, 1065428197],
]
GOLDEN_UNIFORM = [
    [1046854032, 1054516940, 1065127409, 1061592023, 1057116079],
    [1037709640, 1043432992, 1065031079, 1042150312, 1055462276],
]


def test_normal_numbers_are_box_and_mullers(backend, device):
    """Against the formula in float64, from the words of Philox."""
    ids = torch.arange(64, device=device)
    actual = ops.noise(ids, (400,), seed=11, draw=2).double().reshape(64, 100, 2, 2)
    blocks = torch.arange(100, device=device)
    words = philox_reference(torch.tensor(11), ids.unsqueeze(-1), NORMAL_STREAM, torch.tensor(2), blocks)
    words = words.reshape(64, 100, 2, 2).double()
    radius = (-2 * ((torch.floor(words[..., 0] / 2) + 0.5) * 2.0**-31).log()).sqrt()
    # A quarter turn per unit of the top two bits; the rest is a signed fraction of a quarter.
    angle = words[..., 1] * 2.0**-30
    quadrant = torch.floor(angle)
    fraction = angle - quadrant
    fraction = torch.where(fraction >= 0.5, fraction - 1, fraction)
    angle = (quadrant + fraction) * (math.pi / 2)
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    # u is rounded to float32 twice, which moves the radius by at most 2^-24 / radius; the rest is relative.
    allowed = 2.5e-7 * radius + 2.0**-24 / radius
    assert ((actual - expected).norm(dim=-1) <= allowed).all()


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    sample_id=st.integers(-(2**63), 2**63 - 1),
    draw=st.integers(0, 2**30 - 1),
    element=st.integers(0, 99),
)
def test_every_element_has_its_own_address(seed, sample_id, draw, element):
    ids = torch.tensor([sample_id])
    row = ops.uniform(ids, (100,), seed=seed, draw=draw)
    signed = torch.tensor(seed if seed < 2**63 else seed - 2**64)
    alone = philox_uniform_reference(signed, ids, UNIFORM_STREAM, torch.tensor(draw), torch.tensor([element]))
    assert torch.equal(row[:, element], alone)


def test_a_shorter_shape_is_a_prefix(backend, device):
    ids = ids_on(device)
    for function in (ops.noise, ops.uniform):
        long = function(ids, (20,), seed=4, draw=1)
        for n in range(20):
            assert torch.equal(function(ids, (n,), seed=4, draw=1), long[:, :n])
        assert torch.equal(function(ids, (4, 5), seed=4, draw=1), long.view(5, 4, 5))


def test_batch_threads_and_strides_do_not_change_a_bit(backend, device):
    width = 40_000 if backend != "simt" else 3_000
    ids = torch.arange(12, device=device)
    whole = ops.noise(ids, (width,), seed=3)
    order = torch.randperm(12, device=device)
    assert torch.equal(ops.noise(ids[order], (width,), seed=3), whole[order])
    assert torch.equal(ops.noise(ids[5:6], (width,), seed=3), whole[5:6])
    assert torch.equal(ops.noise(ids[1::3], (width,), seed=3), whole[1::3])
    seeds = torch.arange(24, device=device)[::2]
    per_row = torch.cat([ops.noise(ids[i : i + 1], (9,), seed=2 * i, draw=2 * i) for i in range(12)])
    assert torch.equal(ops.noise(ids, (9,), seed=seeds, draw=seeds), per_row)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.noise(ids, (width,), seed=3), whole)
    finally:
        torch.set_num_threads(threads)


def test_distributions():
    ids = torch.arange(100)
    z = ops.noise(ids, (20_000,), seed=8).flatten().double()
    n = z.numel()
    # Five standard errors of each sample moment of a normal distribution.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - moment) < 5 * math.sqrt(variance / n)
    assert stats.kstest(z.numpy()[:200_000], "norm").pvalue > 1e-3
    tail = (z.abs() > 4).sum().item()
    expected = n * math.erfc(4 / math.sqrt(2))
    assert abs(tail - expected) < 5 * math.sqrt(expected)
    u = ops.uniform(ids, (20_000,), seed=8).flatten().double()
    assert 0 <= u.min().item() < 1e-5
    assert 1 - 1e-5 < u.max().item() < 1
    assert stats.kstest(u.numpy()[:200_000], "uniform").pvalue > 1e-3


def test_neighbouring_addresses_are_independent():
    """Correlations between noise whose addresses differ in one place only, and within a row, all within 5 sigma."""
    n = 100_000
    one = torch.tensor([7])
    base = ops.noise(one, (n,), seed=1, draw=1)[0].double()
    others = {
        "sample id": ops.noise(one + 1, (n,), seed=1, draw=1),
        "upper half of the sample id": ops.noise(one + 2**32, (n,), seed=1, draw=1),
        "draw": ops.noise(one, (n,), seed=1, draw=2),
        "seed": ops.noise(one, (n,), seed=2, draw=1),
        "upper half of the seed": ops.noise(one, (n,), seed=1 + 2**32, draw=1),
        "swapped": ops.noise(torch.tensor([1]), (n,), seed=7, draw=1),
        "stream": ops.uniform(one, (n,), seed=1, draw=1) - 0.5,
    }
    for name, other in others.items():
        for a, b in (
            (base, other[0].double()),
            (base**2 - 1, other[0].double() ** 2 - (other[0].double() ** 2).mean()),
        ):
            correlation = (a * b).mean() / (a.std() * b.std())
            assert correlation.abs() < 5 / math.sqrt(n), name
    for lag in (1, 2, 3, 4, 8, 1024):
        for a in (base, base**2 - 1):
            assert (a[lag:] * a[:-lag]).mean().abs() / a.var() < 5 / math.sqrt(n)


def test_streams_differ():
    ids = torch.arange(3)
    words = [philox_reference(torch.tensor(1), ids, stream, torch.tensor(0), torch.tensor(0)) for stream in range(3)]
    assert all((words[i] != words[j]).all() for i in range(3) for j in range(i))


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"sample_ids": torch.zeros(2)}, TypeError, "sample_ids has dtype torch.float32, but expected torch.int64"),
        ({"sample_ids": torch.tensor(3)}, ValueError, r"sample_ids has shape \(\), but expected \(n,\)"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616, but expected a number in"),
        ({"seed": 1.5}, TypeError, "seed is a float"),
        (
            {"seed": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"seed has shape \(3,\), but expected \(\) or \(2,\)",
        ),
        ({"seed": torch.zeros(2)}, TypeError, "seed has dtype torch.float32"),
        ({"draw": -1}, ValueError, "draw is -1, but expected a number in 0 .. 1073741823"),
        ({"draw": 2**30}, ValueError, "draw is 1073741824"),
        ({"draw": torch.zeros(1, 2, dtype=torch.int64)}, ValueError, r"draw has shape \(1, 2\)"),
        ({"dtype": torch.int32}, TypeError, "dtype is torch.int32"),
        ({"shape": (3, -1)}, ValueError, r"shape is \(3, -1\)"),
        ({"shape": (2**20, 2**20)}, ValueError, r"at most 2\^34 elements"),
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_bad_arguments_get_one_sentence(monkeypatch, arguments, error, sentence, native):
    if not native:
        monkeypatch.setattr(_native, "_kernels", {})
    given_ = {"sample_ids": torch.arange(2), "shape": (4,), "seed": 0, **arguments}
    for function in (ops.noise, ops.uniform):
        with pytest.raises(error, match=sentence):
            function(given_["sample_ids"], given_["shape"], **{k: v for k, v in given_.items() if k not in
                                                               ("sample_ids", "shape")})  # fmt: skip


def test_raw_operators_check_what_would_reach_memory(backend, device, namespace):
    operator = getattr(torch.ops, namespace).noise
    ids = torch.arange(2, device=device)
    rest = (0, None, 0, None, torch.float32, False)
    with pytest.raises(RuntimeError, match="sample_ids has another dtype than int64"):
        operator(ids.float(), [4], *rest)
    with pytest.raises(RuntimeError, match=r"sample_ids has shape \(1, 2\)"):
        operator(ids.view(1, 2), [4], *rest)
    with pytest.raises(RuntimeError, match=r"shape has more than 2\^34"):
        operator(ids, [2**31, 2**31, 4], *rest)
    with pytest.raises(RuntimeError, match=r"seed has shape \(3,\), but expected \(\) or \(2,\)"):
        operator(ids, [4], 0, torch.arange(3, device=device), 0, None, torch.float32, False)
    with pytest.raises(RuntimeError, match="dtype is not supported"):
        operator(ids, [4], 0, None, 0, None, torch.int64, False)


def test_raw_operator_passes_opcheck(backend, device, namespace):
    operator = getattr(torch.ops, namespace).noise.default
    ids = torch.arange(3, device=device)
    for shape in ((), (5,), (2, 0), (2, 3)):
        opcheck(operator, (ids, shape, 3, None, 1, None, torch.float32, False))
        opcheck(operator, (ids, shape, 0, ids, 0, ids[0], torch.bfloat16, True))


def test_compiles_in_one_graph(backend, device):
    def sample(ids: torch.Tensor, n: int, seed: int, draw: int) -> torch.Tensor:
        return ops.noise(ids, (n,), seed=seed, draw=draw) * 2 + ops.uniform(ids, (n,), seed=ids, draw=ids)

    compiled = torch.compile(sample, fullgraph=True)
    for n, seed, draw in ((4, 1, 2), (5, -3, 7), (9, 2**63 + 5, 0)):
        ids = torch.arange(n, device=device)
        assert torch.equal(compiled(ids, n, seed, draw), sample(ids, n, seed, draw))


def test_functorch_takes_the_reference(backend, device):
    ids = torch.arange(6, device=device).view(2, 3)
    mapped = torch.vmap(lambda row: ops.noise(row, (5,), seed=2))(ids)
    assert torch.equal(mapped, ops.noise(ids.flatten(), (5,), seed=2).view(2, 3, 5))


def test_unwritten_output_would_show(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        for shape in SHAPES:
            for dtype in DTYPES:
                assert ops.noise(ids_on(device), shape, seed=0, dtype=dtype).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_graph_replay(backend, device):
    if backend != "cuda":
        pytest.skip("graphs are captured on a GPU only")
    ids, draw = torch.arange(64, device=device), torch.zeros((), dtype=torch.int64, device=device)
    ops.noise(ids, (3000,), seed=1, draw=draw)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = ops.noise(ids, (3000,), seed=1, draw=draw)
    draw.fill_(5)
    graph.replay()
    assert torch.equal(z, ops.noise(ids, (3000,), seed=1, draw=5))


@pytest.mark.large
def test_more_than_two_to_the_31_elements(backend, device):
    if backend != "cuda":
        pytest.skip("index arithmetic past 2^31 is tested on a GPU only")
    ids = torch.arange(2, device=device)
    width = 2**31 + 8
    z = ops.noise(ids, (width,), seed=1, dtype=torch.bfloat16)
    blocks = torch.arange(width // 4 - 2, width // 4, device=device)
    words = philox_reference(torch.tensor(1, device=device), ids.view(2, 1), NORMAL_STREAM, ids[0], blocks)
    radius = (-2 * (((words[..., 0::2] >> 1).double() + 0.5) * 2.0**-31).log()).sqrt()
    length = z[:, -8:].double().view(2, 2, 2, 2).norm(dim=-1)
    torch.testing.assert_close(length, radius, rtol=1e-2, atol=1e-2)
