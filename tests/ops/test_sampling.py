"""Sampling from logits against its reference, a float64 inverse distribution, and a goodness-of-fit test."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import DTYPES, LAYOUTS, opcheck
from goodness import fit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from pygen import _native, ops
from pygen.ops.noise import TOKEN_STREAM, philox_reference

FILTERS = [
    {}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.9}, {"top_p": 1e-6}, {"top_k": 300, "top_p": 0.99999},
    {"top_k": 7, "top_p": 0.5, "temperature": 1.7}, {"temperature": 0.2, "top_p": 0.97}, {"temperature": 0},
    {"min_p": 0.05}, {"min_p": 1.0, "top_k": 9}, {"typical_p": 0.9}, {"typical_p": 1e-6, "temperature": 0.6},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.8}, {"top_p": 0.9, "ties": "transformers"},
    {"top_k": 40, "top_p": 0.3, "ties": "transformers", "typical_p": 0.7},
]  # fmt: skip


def shapes_of(rows: int, vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """Rows of logits whose thresholds are hard to find."""
    normal = torch.randn(rows, vocabulary, device=device)
    half = normal.clone()
    half[:, : vocabulary // 2] = -math.inf
    peaked = normal.clone()
    peaked[:, vocabulary // 3] = 12
    return {
        "normal": normal,
        "steep": 8 * normal,
        "ties": (2 * normal).round() / 2,
        "flat": torch.zeros_like(normal),
        "signed zeros": torch.where(normal > 0, 0.0, -0.0) - (normal > 1).float(),
        "half excluded": half,
        "peaked": peaked,
        "ascending": normal.sort(-1).values,
        "descending": normal.sort(-1, descending=True).values,
        "huge": normal * 1e38,
    }


def agree(logits: Tensor, **options: object) -> None:
    ids = torch.arange(len(logits), device=logits.device) + 5
    arguments = {"seed": 11, "sample_ids": ids, "position": 3, **options}
    token, log_prob = ops.sample_logits(logits, **arguments)
    expected_token, expected = ops.sample_logits_reference(logits, **arguments)
    assert torch.equal(token, expected_token), options
    assert log_prob.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    tolerance = 1e-11 if logits.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(log_prob, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(backend, device, dtype):
    for vocabulary in (1, 2, 65, 700) if backend == "simt" else (1, 2, 63, 64, 65, 129, 700, 5000):
        for logits in shapes_of(2 if backend == "simt" else 5, vocabulary, device).values():
            for options in FILTERS:
                agree(logits.to(dtype), **options)


@pytest.mark.parametrize("shape", shapes_of(1, 4, torch.device("cpu")))
def test_finds_thresholds_in_a_large_vocabulary(backend, device, shape):
    vocabulary = 3000 if backend == "simt" else 50_257
    logits = shapes_of(2, vocabulary, device)[shape]
    for options in ({}, {"top_k": 2000}, {"top_p": 0.95}, {"top_k": 50, "top_p": 0.5}, {"top_p": 1 - 1e-9}):
        agree(logits, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_any_strides(backend, device, layout):
    for dtype in (torch.float32, torch.bfloat16):
        agree(LAYOUTS[layout]((6, 50), dtype, device), top_k=20, top_p=0.8)
    ids = torch.arange(12, device=device)[::2]
    agree(torch.randn(6, 50, device=device), sample_ids=ids, seed=ids.flip(0), position=ids.expand(2, 6).T[:, 0])


def uniforms(seed: int, ids: Tensor, position: int) -> Tensor:
    """u of each draw from the words of its address: 53 bits, the upper 27 of word 0 and the upper 26 of word 1."""
    block = torch.zeros(len(ids), dtype=torch.int64)
    words = philox_reference(torch.tensor(seed), ids.cpu(), TOKEN_STREAM, torch.tensor(position), block)
    return ((words[:, 0] >> 5) * 2**26 + (words[:, 1] >> 6)).double() / 2**53


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverts_the_distribution(backend, device, dtype):
    rows, tolerance = 200 if backend == "simt" else 5000, 2e-6 if dtype == torch.float32 else 1e-12
    logits = 2 * torch.randn(rows, 37, dtype=dtype, device=device)
    ids = torch.arange(rows, device=device)
    token, log_prob = ops.sample_logits(logits, seed=2**63 + 9, sample_ids=ids, position=77, temperature=0.8)
    probability = (logits.double().cpu() / 0.8).softmax(-1)
    upto = probability.cumsum(-1).gather(-1, token.cpu().unsqueeze(-1)).squeeze(-1)
    own = probability.gather(-1, token.cpu().unsqueeze(-1)).squeeze(-1)
    u = uniforms(9 - 2**63, ids, 77)
    assert (u <= upto + tolerance).all()
    assert (u >= upto - own - tolerance).all()
    torch.testing.assert_close(log_prob.double().cpu(), own.log(), rtol=tolerance, atol=tolerance)


def filtered(logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """The kept distribution in float64, by a loop over tokens in order of size."""
    probability = (logits.double() / temperature).softmax(-1)
    if top_k is not None:
        probability = torch.where(logits >= logits.sort(descending=True).values[top_k - 1], probability, 0.0)
        probability = probability / probability.sum()
    kept, mass = torch.zeros_like(probability), 0.0
    for value in logits.unique().flip(0):
        if mass >= top_p:
            break
        tied = logits == value
        kept[tied] = probability[tied]
        mass = float(kept.sum())
    return kept / kept.sum()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 9}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.9}]
)
def test_draws_the_distribution_and_nothing_else(backend, device, options):
    draws = 800 if backend == "simt" else 60_000
    logits = 1.5 * torch.randn(40, device=device)
    ids = torch.arange(draws, device=device)
    token, log_prob = ops.sample_logits(logits.expand(draws, 40), seed=5, sample_ids=ids, position=0, **options)
    probability = filtered(logits.cpu(), **options)
    token = token.cpu()
    assert fit(token, probability) > 1e-4
    assert (probability[token] > 0).all()
    if backend == "cpu":
        likely = probability * draws > 20
        assert torch.equal(likely & (torch.bincount(token, minlength=40) > 0), likely)
    torch.testing.assert_close(log_prob.cpu(), probability.log().float()[token], rtol=2e-6, atol=2e-6)


def test_consecutive_positions_and_seeds_are_independent(backend, device):
    draws = 400 if backend == "simt" else 20_000
    ids = torch.arange(draws, device=device)
    logits = torch.randn(1, 6, device=device).expand(draws, 6)
    first, after, other = (
        ops.sample_logits(logits, seed=seed, sample_ids=ids, position=position)[0].cpu()
        for seed, position in ((1, 0), (1, 1), (2, 0))
    )
    probability = logits[0].softmax(-1).cpu()
    pairs = torch.outer(probability, probability).flatten()
    for second in (after, other, first.roll(1)):
        assert fit(first * 6 + second, pairs) > 1e-4


def test_the_goodness_of_fit_sees_five_percent_lost():
    """The test of the tests: a sampler that drops 5% of the mass, or moves it, is rejected at once."""
    probability = filtered(1.5 * torch.randn(40))
    order = probability.sort()
    tail = order.indices[order.values.cumsum(0) <= 0.05]
    cut, moved = probability.clone(), probability.clone()
    cut[tail] = 0
    moved[0] += 0.05
    for wrong in (cut, moved):
        assert fit(torch.multinomial(wrong, 60_000, replacement=True), probability) < 1e-12
    # Fewer draws, on the slow backend, still see that the tail is gone.
    assert fit(torch.multinomial(cut, 800, replacement=True), probability) < 1e-4
    assert fit(torch.multinomial(probability, 60_000, replacement=True), probability) > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_are_kept_together(backend, device, dtype):
    logits = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0, 1.0], device=device, dtype=dtype)
    draws = 100
    ids = torch.arange(draws, device=device)
    for options, support in (
        ({"top_k": 1}, {1, 2, 4}), ({"top_k": 3}, {1, 2, 4}), ({"top_k": 4}, {0, 1, 2, 4, 5}),
        ({"top_p": 0.1}, {1, 2, 4}), ({"top_p": 0.7}, {1, 2, 4}), ({"top_p": 0.8}, {0, 1, 2, 4, 5}),
        ({"top_k": 5, "top_p": 0.7}, {1, 2, 4}), ({"temperature": 0}, {1}),
    ):  # fmt: skip
        token, _ = ops.sample_logits(logits.expand(draws, 6), seed=0, sample_ids=ids, position=1, **options)
        assert set(token.tolist()) == support, options


def test_rows_that_are_no_distribution_are_marked(backend, device):
    logits = torch.randn(6, 70, device=device)
    clean = ops.sample_logits(logits, seed=1, sample_ids=torch.arange(6, device=device), position=0)
    logits[1, 69] = math.nan
    logits[2, 3] = math.inf
    logits[4] = -math.inf
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0}):
        token, log_prob = ops.sample_logits(
            logits, seed=1, sample_ids=torch.arange(6, device=device), position=0, **options
        )
        assert (token == -1).tolist() == [False, True, True, False, True, False]
        assert torch.equal(log_prob.isnan(), token == -1)
        if not options:
            good = [0, 3, 5]
            assert torch.equal(token[good], clean[0][good])
            assert torch.equal(log_prob[good], clean[1][good])


def test_extreme_temperatures(backend, device):
    logits = torch.tensor([[0.0, 1.0, -math.inf, 1.0 - 1e-6]], device=device)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    for temperature in (1e-300, 1e-40, 1e-12, 1e12, 1e300):
        tokens = {
            int(ops.sample_logits(logits, seed=0, sample_ids=ids, position=i, temperature=temperature)[0])
            for i in range(40)
        }
        assert tokens == ({1} if temperature < 1 else {0, 1, 3})
        agree(logits, temperature=temperature, top_p=0.5)


def test_a_row_does_not_depend_on_its_batch(backend, device):
    for dtype in (torch.float32, torch.bfloat16):
        logits = (3 * torch.randn(5, 1000, device=device)).to(dtype)
        ids = torch.tensor([7, 2**40, -3, 0, 99], device=device)
        options = {"seed": 4, "position": 2**30 - 1, "top_k": 800, "top_p": 0.9}
        together = ops.sample_logits(logits, sample_ids=ids, **options)
        order = torch.tensor([3, 1, 4, 0, 2], device=device)
        shuffled = ops.sample_logits(logits[order], sample_ids=ids[order], **options)
        for whole, part in zip(together, shuffled, strict=True):
            assert torch.equal(part, whole[order])
        for row in range(5):
            alone = ops.sample_logits(logits[row : row + 1], sample_ids=ids[row : row + 1], **options)
            assert torch.equal(alone[0], together[0][row : row + 1])
            assert torch.equal(alone[1], together[1][row : row + 1])


@pytest.mark.usefixtures("four_threads")
def test_threads_do_not_change_a_bit(backend, device):
    if backend != "cpu":
        pytest.skip("one grid, however many threads")
    logits, ids = 2 * torch.randn(32, 5000), torch.arange(32)
    results = []
    for threads in (1, 2, 3):
        _native.set_num_threads(threads)
        results.append(ops.sample_logits(logits, seed=1, sample_ids=ids, position=1, top_p=0.9))
    _native.set_num_threads(0)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


def test_backends_agree_in_every_bit(backend, device):
    """The weights are whole numbers from one piece of arithmetic, so CPU and CUDA sources give the same numbers."""
    if backend != "simt":
        pytest.skip("compares the CPU kernels with the CUDA sources")
    ids = torch.arange(16)
    for dtype in (torch.float32, torch.bfloat16):
        history = torch.randint(-1, 2000, (16, 50))
        for options in (
            {}, {"top_k": 100}, {"top_p": 0.9}, {"temperature": 0.3}, {"min_p": 0.01}, {"typical_p": 0.9},
            {"guidance_scale": 1.5, "repetition_penalty": 1.2, "top_p": 0.8}, {"top_p": 0.7, "split_ties": True},
        ):  # fmt: skip
            logits = (3 * torch.randn(16, 2000)).to(dtype)
            unconditional = torch.randn(16, 2000).to(dtype)
            ours = dict(options)
            if ours.pop("split_ties", False):
                ours["ties"] = "transformers"
            fibers = ops.sample_logits(
                logits, seed=3, sample_ids=ids, position=8, unconditional=unconditional, history=history, **ours
            )
            numbers = {"temperature": 1.0, "top_k": 2**31, "top_p": 1.0, **options}
            cpu = torch.ops.pygen.sample_logits(
                logits, ids, 3, None, 8, None, unconditional=unconditional, history=history, **numbers
            )
            assert torch.equal(fibers[0], cpu[0])
            assert torch.equal(fibers[1], cpu[1])


def test_seeds_and_positions_may_be_tensors(backend, device):
    logits, ids = torch.randn(4, 30, device=device), torch.arange(4, device=device)
    seeds = torch.tensor([5, -1, 2**62, 5], device=device)
    positions = torch.tensor([0, 9, 2**30 - 1, 4], device=device)
    token, log_prob = ops.sample_logits(logits, seed=seeds, sample_ids=ids, position=positions)
    for i in range(4):
        alone = ops.sample_logits(
            logits[i : i + 1], seed=int(seeds[i]), sample_ids=ids[i : i + 1], position=int(positions[i])
        )
        assert (int(alone[0]), float(alone[1])) == (int(token[i]), float(log_prob[i]))
    zero_dim = ops.sample_logits(logits, seed=seeds[1], sample_ids=ids, position=positions[3])
    numbers = ops.sample_logits(logits, seed=2**64 - 1, sample_ids=ids, position=4)
    assert torch.equal(zero_dim[0], numbers[0])
    assert torch.equal(zero_dim[1], numbers[1])


@given(
    st.integers(1, 400), st.sampled_from([0.05, 1.0, 5.0, 300.0]), st.none() | st.integers(1, 450),
    st.none() | st.floats(1e-6, 1.0), st.floats(0.05, 20.0), st.booleans(), st.integers(0, 2**30),
    st.none() | st.floats(1e-6, 1.0), st.none() | st.floats(1e-6, 1.0), st.sampled_from(["keep", "transformers"]),
)  # fmt: skip
def test_any_row_and_filter(vocabulary, spread, top_k, top_p, temperature, tied, seed, min_p, typical_p, ties):
    torch.manual_seed(seed)
    logits = spread * torch.randn(3, vocabulary, dtype=torch.float64)
    agree(
        logits.round() if tied else logits, seed=seed, top_k=top_k, top_p=top_p, temperature=temperature, min_p=min_p,
        typical_p=typical_p, ties=ties,
    )  # fmt: skip


def test_empty_batch(backend, device):
    ids = torch.empty(0, dtype=torch.int64, device=device)
    token, log_prob = ops.sample_logits(torch.empty(0, 5, device=device), seed=0, sample_ids=ids, position=0)
    assert token.shape == log_prob.shape == (0,)


def test_logits_count_as_constants(backend, device):
    logits = torch.randn(2, 5, device=device, requires_grad=True)
    ids = torch.arange(2, device=device)
    assert not ops.sample_logits(logits, seed=0, sample_ids=ids, position=0)[1].requires_grad


REFUSALS = {
    "logits has shape (2, 0), but expected (rows, vocabulary)": {"logits": torch.zeros(2, 0)},
    "logits has shape (5,), but expected (rows, vocabulary)": {"logits": torch.zeros(5)},
    "logits has dtype torch.int64": {"logits": torch.zeros(2, 5, dtype=torch.int64)},
    "sample_ids has shape (3,), but expected (2,)": {"sample_ids": torch.arange(3)},
    "sample_ids has dtype torch.int32": {"sample_ids": torch.arange(2, dtype=torch.int32)},
    "sample_ids is on meta, but expected cpu": {"sample_ids": torch.arange(2, device="meta")},
    "temperature is -1.0, but expected a finite number >= 0": {"temperature": -1.0},
    "temperature is nan": {"temperature": math.nan},
    "temperature is inf": {"temperature": math.inf},
    "top_k is 0, but expected at least 1": {"top_k": 0},
    "top_p is 0.0, but expected a number in (0, 1]": {"top_p": 0.0},
    "top_p is 1.5": {"top_p": 1.5},
    "top_p is nan": {"top_p": math.nan},
    "min_p is -0.1, but expected a number in [0, 1]": {"min_p": -0.1},
    "typical_p is 0, but expected a number in (0, 1]": {"typical_p": 0},
    "repetition_penalty is 0, but expected a finite number > 0": {"repetition_penalty": 0},
    "repetition_penalty is 1.2, but there is no history": {"repetition_penalty": 1.2},
    "history has shape (2,), but expected (2, length)": {"repetition_penalty": 1.2, "history": torch.arange(2)},
    "history has dtype torch.int32": {"repetition_penalty": 1.2, "history": torch.zeros(2, 3, dtype=torch.int32)},
    "guidance_scale is inf": {"guidance_scale": math.inf},
    "guidance_scale is 2.0, but there are no unconditional logits": {"guidance_scale": 2.0},
    "unconditional has shape (2, 4), but expected (2, 5)": {
        "guidance_scale": 2.0,
        "unconditional": torch.zeros(2, 4),
    },
    "unconditional has dtype torch.float64": {
        "guidance_scale": 2.0,
        "unconditional": torch.zeros(2, 5, dtype=torch.float64),
    },
    "unconditional is on meta": {"guidance_scale": 2.0, "unconditional": torch.zeros(2, 5, device="meta")},
    "allowed has shape (4,), but expected (5,), (1, 5) or (2, 5)": {"allowed": torch.ones(4, dtype=torch.bool)},
    "allowed has dtype torch.float32": {"allowed": torch.ones(5)},
    'ties is \'split\', but expected "keep" or "transformers"': {"ties": "split"},
    "position is 1073741824": {"position": 2**30},
    "position is -1": {"position": -1},
    "position has shape (3,)": {"position": torch.arange(3)},
    "seed has dtype torch.float32": {"seed": torch.zeros(2)},
    "seed is 18446744073709551616": {"seed": 2**64},
    "seed is a float, but expected an int or an int64 tensor": {"seed": 1.5},
    "position is a str, but expected an int or an int64 tensor": {"position": "first"},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refuses_in_one_sentence(message):
    arguments = {"logits": torch.zeros(2, 5), "seed": 0, "sample_ids": torch.arange(2), "position": 0}
    ops.sample_logits(**arguments)
    with pytest.raises((ValueError, TypeError)) as error:
        ops.sample_logits(**{**arguments, **REFUSALS[message]})
    assert message in str(error.value)


def test_raw_operator_passes_opcheck(backend, device, namespace):
    operator = getattr(torch.ops, namespace).sample_logits.default
    logits, ids = torch.randn(2, 9, device=device), torch.arange(2, device=device)
    opcheck(operator, (logits, ids, 1, None, 2, None, 1.0, 5, 0.9))
    opcheck(operator, (logits.T.contiguous().T.double(), ids, 1, ids, 2, ids[0], 0.0, 2**31, 1.0))


def test_compiles_in_one_graph(backend, device):
    logits, ids = torch.randn(3, 40, device=device), torch.arange(3, device=device)

    def step(logits: Tensor, ids: Tensor, position: int) -> tuple[Tensor, Tensor]:
        return ops.sample_logits(logits * 2, seed=1, sample_ids=ids, position=position, top_k=10, top_p=0.9)

    compiled = torch.compile(step, fullgraph=True)
    for position in (0, 1, 2):
        for actual, expected in zip(compiled(logits, ids, position), step(logits, ids, position), strict=True):
            assert torch.equal(actual, expected)


def test_a_loop_over_positions_compiles_once(backend, device):
    torch.compiler.reset()
    logits, ids = torch.randn(3, 40, device=device), torch.arange(3, device=device)
    counter = CompileCounter()
    token_of = torch.compile(
        lambda x, i: ops.sample_logits(x, seed=1, sample_ids=ids, position=i), fullgraph=True, backend=counter
    )
    positions = 3 * torch._dynamo.config.recompile_limit
    for i in reversed(range(positions)):
        token_of(logits, i)
        if i == positions - 2:  # by now the compiler knows that the position varies; it treats 0 and 1 as constants
            compilations = counter.frame_count
        if i == 2:
            assert counter.frame_count == compilations


def test_unwritten_output_would_show(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        for dtype in DTYPES:
            for rows, vocabulary in ((1, 1), (5, 40), (3, 5000)):
                logits, ids = torch.randn(rows, vocabulary, device=device).to(dtype), torch.arange(rows, device=device)
                for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}):
                    token, log_prob = ops.sample_logits(logits, seed=1, sample_ids=ids, position=0, **options)
                    assert ((token >= 0) & (token < vocabulary)).all()
                    assert log_prob.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_numbers_of_numpy(backend, device):
    logits, ids = torch.randn(3, 40, device=device), torch.arange(3, device=device)
    for function in (ops.sample_logits, ops.sample_logits_reference):
        expected = function(logits, seed=2**64 - 1, sample_ids=ids, position=4)
        for position in (np.int64(4), np.uint8(4)):
            actual = function(logits, seed=np.uint64(2**64 - 1), sample_ids=ids, position=position)
            assert torch.equal(actual[0], expected[0])
            assert torch.equal(actual[1], expected[1])


def test_raw_operator_refuses_another_device(backend, device, namespace):
    if backend != "cuda":
        pytest.skip("two devices are needed")
    operator = getattr(torch.ops, namespace).sample_logits.default
    logits, ids = torch.randn(2, 9, device=device), torch.arange(2, device=device)
    for name, arguments in {
        "sample_ids": (ids.cpu(), 1, None, 2, None), "seed": (ids, 1, ids.cpu(), 2, None),
        "position": (ids, 1, None, 2, ids.cpu()),
    }.items():  # fmt: skip
        with pytest.raises(RuntimeError, match=f"{name} is on another device than logits"):
            operator(logits, *arguments, 1.0, 5, 0.9)


def test_graph_replay(backend, device):
    if backend != "cuda":
        pytest.skip("graphs are captured on a GPU only")
    logits, ids = torch.randn(4, 50_257, device=device), torch.arange(4, device=device)
    position = torch.zeros((), dtype=torch.int64, device=device)
    options = {"seed": 1, "sample_ids": ids, "position": position, "top_k": 500, "top_p": 0.9}
    ops.sample_logits(logits, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token, log_prob = ops.sample_logits(logits, **options)
        position += 1
    for step in range(3):
        logits.normal_()
        graph.replay()
        expected = ops.sample_logits(logits, **{**options, "position": step})
        assert torch.equal(token, expected[0])
        assert torch.equal(log_prob, expected[1])


@pytest.mark.large
def test_index_arithmetic_past_2_31(backend, device):
    rows, vocabulary = 2**16 + 3, 2**15
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=device)
    chosen = torch.arange(rows, device=device) % vocabulary
    logits.scatter_(1, chosen.unsqueeze(1), 100.0)
    token, _ = ops.sample_logits(logits, seed=0, sample_ids=torch.arange(rows, device=device), position=0)
    assert torch.equal(token, chosen)
