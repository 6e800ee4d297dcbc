"""The diffusion step: equal to its reference in every bit, to the textbook's DDPM and DDIM, and differentiable."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, LAYOUTS, close, opcheck
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from pygen import _native, ops
from pygen.ops.schedule import MAX_HISTORY, diffusion_step_reference

SHAPES = [(4, 8), (1, 1), (3,), (0, 3), (3, 0), (2, 3, 5, 7), (3, 1027), (2, 16_390)]
STEPS = 7


def table_of(history: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(STEPS, 6 + history, device=device)


def pair(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(shape, device=device).to(dtype) for _ in range(2))  # type: ignore[return-value]


def both(*arguments: Any, **options: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the operator and the reference return, as tuples."""
    results = (ops.diffusion_step(*arguments, **options), diffusion_step_reference(*arguments, **options))
    return tuple(r if isinstance(r, tuple) else (r,) for r in results)  # type: ignore[return-value]


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def steps_of(n: int, device: torch.device) -> dict[str, int | Tensor]:
    return {
        "int": STEPS - 1,
        "device": torch.tensor(2, device=device),
        "per sample": torch.arange(n, device=device) % STEPS,
    }


@pytest.mark.parametrize("kind", ["int", "device", "per sample"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference_in_every_bit(backend, device, dtype, kind):
    for shape in SHAPES:
        n = shape[0]
        x, e = pair(shape, dtype, device)
        ids = torch.arange(n, device=device) * 3 - 2
        noises: list[dict[str, Any]] = [
            {},
            {"noise": torch.randn(shape, device=device).to(dtype)},
            {"seed": 5, "sample_ids": ids},
            {"seed": ids * 7, "sample_ids": ids},
        ]
        for history, clip, noise in [(0, None, 0), (0, 0.5, 1), (2, (-0.3, 0.8), 2), (1, None, 3), (3, 1.0, 0)]:
            for return_denoised in (False, True):
                actual, expected = both(
                    x, e, table_of(history, device), step=steps_of(n, device)[kind], clip=clip,
                    history=[torch.randn(shape, device=device).to(dtype) for _ in range(history)],
                    return_denoised=return_denoised, **noises[noise],
                )  # fmt: skip
                assert actual[0].dtype == dtype
                assert_same_bits(actual, expected)


def test_ddpm_and_ddim_are_rows_of_the_table(backend, device):
    """Ho et al. 2020, eq. 7 and 11, and Song et al. 2021, eq. 12 with eta = 0, computed in float64 from their text."""
    betas = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64, device=device)
    bars = torch.cumprod(1 - betas, 0)
    t, s = 30, 20
    x, e = pair((4, 3, 8, 8), torch.float32, device)
    z = ops.noise(torch.arange(4, device=device), (3, 8, 8), seed=1, draw=0)
    wide_x, wide_e = x.double(), e.double()
    mean = (wide_x - betas[t] / (1 - bars[t]).sqrt() * wide_e) / (1 - betas[t]).sqrt()
    ddpm = mean + betas[t].sqrt() * z.double()
    denoised = (wide_x - (1 - bars[t]).sqrt() * wide_e) / bars[t].sqrt()
    ddim = bars[s].sqrt() * denoised + (1 - bars[s]).sqrt() * wide_e

    to_x, to_e = 1 / bars[t].sqrt(), -(1 - bars[t]).sqrt() / bars[t].sqrt()
    previous = bars[t - 1]
    posterior_m0 = previous.sqrt() * betas[t] / (1 - bars[t])
    posterior_x = (1 - betas[t]).sqrt() * (1 - previous) / (1 - bars[t])
    zero = torch.zeros_like(to_x)
    table = torch.stack([
        torch.stack([to_x, to_e, posterior_m0, posterior_x, zero, betas[t].sqrt()]),
        torch.stack([to_x, to_e, bars[s].sqrt(), zero, (1 - bars[s]).sqrt(), zero]),
    ]).float()  # fmt: skip
    ids = torch.arange(4, device=device)
    close(ops.diffusion_step(x, e, table, step=0, seed=1, sample_ids=ids), ddpm.float(), scale=4)
    actual, m0 = ops.diffusion_step(x, e, table, step=1, seed=1, sample_ids=ids, return_denoised=True)
    close(actual, ddim.float(), scale=4)
    close(m0, denoised.float(), scale=4)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("e_dtype", DTYPES)
def test_mixes_dtypes(backend, device, x_dtype, e_dtype):
    x, _ = pair((3, 50), x_dtype, device)
    e, h = pair((3, 50), e_dtype, device)
    actual, expected = both(
        x, e, table_of(2, device), step=1, history=[h, x], noise=h.to(torch.float32), clip=1.0, return_denoised=True
    )
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_any_strides(backend, device, layout, dtype):
    shape = (3, 4, 5, 8)
    x, e, z, h = (LAYOUTS[layout](shape, dtype, device) for _ in range(4))
    per_sample = torch.tensor([0, 9, 1, 9, 2, 9], device=device)[::2]
    for step in (1, per_sample):
        for noise in ({}, {"noise": z}, {"seed": 3, "sample_ids": per_sample}):
            actual, expected = both(x, e, table_of(2, device)[::2, :7], step=step, history=[h], **noise)
            assert_same_bits(actual, expected)
            dense_sample = both(x.contiguous(), e, table_of(0, device), step=step)
            assert_same_bits(*dense_sample)


@pytest.mark.parametrize("addressed", [False, True])
def test_channels_last_stays_channels_last(backend, device, addressed):
    x, e = (t.to(memory_format=torch.channels_last) for t in pair((2, 3, 4, 5), torch.float32, device))
    noise = {"seed": 3, "sample_ids": torch.arange(2, device=device)} if addressed else {}
    table = table_of(1, device)
    for step in (2, torch.tensor([1, 4], device=device)):
        arguments = {"step": step, "history": [e], "clip": 1.0, "return_denoised": True, **noise}
        actual, expected = both(x, e, table, **arguments)
        assert_same_bits(actual, expected)
        for result in actual:
            assert result.is_contiguous(memory_format=torch.channels_last)
        # The layout of a tensor is no part of what it is.
        assert_same_bits(actual, ops.diffusion_step(x.contiguous(), e.contiguous(), table, **arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_addressed_noise_is_that_of_the_noise_operator(backend, device, dtype):
    x, e = pair((5, 2, 1031), dtype, device)
    ids, per_sample = torch.tensor([3, 1, 4, 1, -5], device=device), torch.tensor([0, 3, 6, 3, 1], device=device)
    table = table_of(0, device)
    for step in (4, torch.tensor(5, device=device), per_sample):
        z = ops.noise(ids, (2, 1031), seed=9, draw=step)
        given_ = ops.diffusion_step(x, e, table, step=step, noise=z)
        addressed = ops.diffusion_step(x, e, table, step=step, seed=9, sample_ids=ids)
        assert torch.equal(addressed, given_)
    # Every step of a loop has noise of its own.
    table = torch.zeros(3, 6, device=device)
    table[:, 5] = 1
    first, second = (ops.diffusion_step(x, e, table, step=i, seed=9, sample_ids=ids) for i in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(second, ops.noise(ids, (2, 1031), seed=9, draw=2, dtype=dtype))


def test_no_noise_where_its_coefficient_is_zero(backend, device):
    x, e = pair((3, 40), torch.float32, device)
    table = table_of(0, device)
    table[:, 5] = torch.tensor([0.0, 1, 0, 1, 0, 1, 0])
    ids = torch.arange(3, device=device)
    for step in (0, torch.tensor(2, device=device), torch.tensor([0, 1, 2], device=device)):
        actual, expected = both(x, e, table, step=step, seed=1, sample_ids=ids)
        assert_same_bits(actual, expected)
    assert torch.equal(
        ops.diffusion_step(x, e, table, step=0, seed=1, sample_ids=ids), ops.diffusion_step(x, e, table, step=0)
    )


def test_a_step_out_of_range(backend, device):
    x, e = pair((4, 9), torch.float32, device)
    table = table_of(1, device)
    for step in (-1, STEPS, 10**12):
        with pytest.raises(ValueError, match=f"step is {step}, but expected a row of the table, 0 .. {STEPS - 1}"):
            ops.diffusion_step(x, e, table, step=step, history=[e])
    per_sample = torch.tensor([0, -1, STEPS, STEPS - 1], device=device)
    noise: dict[str, Any]
    for noise in ({}, {"seed": 3, "sample_ids": per_sample}):
        actual, expected = both(x, e, table, step=per_sample, history=[e], clip=1.0, return_denoised=True, **noise)
        assert_same_bits(actual, expected)
        for result in actual:
            assert result[[0, 3]].isfinite().all()
            assert result[[1, 2]].isnan().all()
    for wrong in (-1, STEPS, 2**62):
        index = torch.tensor(wrong, device=device)
        assert ops.diffusion_step(x, e, table, step=index, history=[e]).isnan().all()


def test_invalid_data_stays_in_its_element(backend, device):
    x, e = pair((3, 9), torch.float32, device)
    table = table_of(0, device)
    clean = ops.diffusion_step(x, e, table, step=1, clip=1.0)
    e[1, 4] = math.nan
    y, m0 = ops.diffusion_step(x, e, table, step=1, clip=1.0, return_denoised=True)
    assert y[1, 4].isnan()
    assert m0[1, 4].isnan()
    y[1, 4] = clean[1, 4]
    assert torch.equal(y, clean)


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    history=st.integers(0, MAX_HISTORY + 1),
    clip=st.sampled_from([None, 0.7, (-0.2, 0.4)]),
    seed=st.integers(-(2**63), 2**64 - 1),
    data=st.data(),
)
def test_any_arguments(shape, history, clip, seed, data):
    x, e = pair(shape, data.draw(st.sampled_from(DTYPES)), torch.device("cpu"))
    step = data.draw(st.sampled_from(list(steps_of(shape[0], x.device).values())))
    addressed = data.draw(st.booleans())
    noise = {"seed": seed, "sample_ids": torch.arange(shape[0])} if addressed else {}
    actual, expected = both(
        x, e, table_of(history), step=step, clip=clip, history=[torch.randn(shape) for _ in range(history)], **noise
    )
    assert_same_bits(actual, expected)


def test_threads_and_batch_position_do_not_change_a_bit(backend, device):
    width = 50_000 if backend != "simt" else 3_000
    x, e = pair((6, width), torch.float32, device)
    table, ids = table_of(0, device), torch.arange(6, device=device)
    step = torch.arange(6, device=device)
    whole = ops.diffusion_step(x, e, table, step=step, seed=2, sample_ids=ids)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.diffusion_step(x, e, table, step=step, seed=2, sample_ids=ids), whole)
    finally:
        torch.set_num_threads(threads)
    alone = ops.diffusion_step(x[4:5], e[4:5], table, step=4, seed=2, sample_ids=ids[4:5])
    assert torch.equal(alone, whole[4:5])


CLIPS = [None, 0.4, (-0.1, 0.3)]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kind", ["int", "device", "per sample"])
def test_gradients(backend, device, clip, kind):
    shape = (3, 4)
    tensors = [torch.randn(shape, dtype=torch.float64, device=device).requires_grad_() for _ in range(5)]
    table, step = table_of(2, device), steps_of(3, device)[kind]
    for return_denoised in (False, True):

        def transform(x: Tensor, e: Tensor, z: Tensor, h0: Tensor, h1: Tensor, denoised: bool = return_denoised) -> Any:
            return ops.diffusion_step(
                x, e, table, step=step, history=[h0, h1], noise=z, clip=clip, return_denoised=denoised
            )

        assert torch.autograd.gradcheck(transform, tensors)
        assert torch.autograd.gradgradcheck(transform, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", CLIPS)
def test_gradients_are_those_of_the_reference(backend, device, clip, dtype):
    base = torch.randn(5, 2, 1030, device=device)
    layouts = {
        "dense": base.clone(),
        "half": torch.cat((base, base), 1)[:, 2:],
        "transposed": base.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    }
    table, step = table_of(1, device), torch.arange(5, device=device)
    e = torch.randn_like(base).to(dtype)
    for return_denoised in (False, True):
        for x in layouts.values():
            grads = []
            for function in (ops.diffusion_step, diffusion_step_reference):
                leaves = [t.detach().clone().requires_grad_() for t in (x.to(dtype), e, base, e.float())]
                result = function(
                    leaves[0], leaves[1], table, step=step, noise=leaves[2], history=[leaves[3]], clip=clip,
                    return_denoised=return_denoised,
                )  # fmt: skip
                parts = result if return_denoised else (result,)
                sum((part.float() * base).sum() for part in parts).backward()
                grads.append([leaf.grad for leaf in leaves])
            for actual, expected in zip(*grads, strict=True):
                assert actual.dtype == expected.dtype
                close(actual, expected, scale=4)


def test_the_bounds_themselves_pass_the_gradient(backend, device):
    x = torch.tensor([-2.0, -1, 0, 1, 2, math.nan], device=device).requires_grad_()
    table = torch.tensor([[1.0, 0, 1, 0, 0, 0]], device=device)
    ops.diffusion_step(x, torch.zeros_like(x), table, step=0, clip=1.0).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0, 0]


def test_gradients_where_only_some_are_wanted(backend, device):
    x, e = pair((3, 4), torch.float32, device)
    table, ids = table_of(1, device), torch.arange(3, device=device)
    for clip in CLIPS:
        for name in ("sample", "model_output", "history"):
            tensors = {"sample": x.clone(), "model_output": e.clone(), "history": x.clone()}
            tensors[name].requires_grad_()
            grads = [
                torch.autograd.grad(
                    function(
                        tensors["sample"], tensors["model_output"], table, step=1, history=[tensors["history"]], seed=1,
                        sample_ids=ids, clip=clip,
                    ).sum(),
                    tensors[name],
                )[0]
                for function in (ops.diffusion_step, diffusion_step_reference)
            ]  # fmt: skip
            close(*grads, scale=2)


def test_coefficients_can_be_learned(backend, device):
    x, e = pair((3, 4), torch.float32, device)
    table = table_of(0, device).requires_grad_()
    (ops.diffusion_step(x, e, table, step=2) * e).sum().backward()
    assert (table.grad[2, :5] != 0).all()
    assert (table.grad[[0, 1, 3, 4, 5, 6]] == 0).all()


def test_nothing_is_saved_without_a_clip():
    x, e = (t.requires_grad_() for t in pair((3, 4), torch.float32, torch.device("cpu")))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.diffusion_step(x, e, table_of(), step=0)
        assert all(t.shape != x.shape for t in saved)
        ops.diffusion_step(x, e, table_of(), step=0, clip=1.0)
    assert sum(t.shape == x.shape for t in saved) == 2


@pytest.mark.parametrize(
    ("clip", "compiler", "with_gradient"),
    [(None, "aot_eager", False), (0.4, "inductor", False), ((-0.1, 0.3), "aot_eager", True)],
)
def test_compiles_in_one_graph(backend, device, clip, compiler, with_gradient):
    torch.compiler.reset()
    table, ids = table_of(1, device), torch.arange(4, device=device)

    def loop(x: Tensor, e: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
        return ops.diffusion_step(
            x * 2, e, table, step=step, history=[e], seed=3, sample_ids=ids, clip=clip, return_denoised=True
        )

    compiled = torch.compile(loop, fullgraph=True, backend=compiler)
    x, e = (t.requires_grad_(with_gradient) for t in pair((4, 8), torch.float32, device))
    for step in (3, torch.tensor(3, device=device), torch.arange(4, device=device)):
        actual, expected = compiled(x, e, step), loop(x, e, step)
        for a, b in zip(actual, expected, strict=True):
            close(a, b, scale=2)
        if with_gradient:
            weights = torch.randn_like(x)
            grads = [
                torch.autograd.grad((r[0] * weights).sum() + (r[1] ** 2).sum(), (x, e)) for r in (actual, expected)
            ]
            for a, b in zip(*grads, strict=True):
                close(a, b, scale=8)


def test_a_loop_over_steps_compiles_once(backend, device):
    torch.compiler.reset()
    x, e = pair((4, 8), torch.float32, device)
    table, ids = table_of(0, device), torch.arange(4, device=device)
    counter = CompileCounter()
    step_of = torch.compile(
        lambda x, i: ops.diffusion_step(x, e, table, step=i, seed=3, sample_ids=ids), fullgraph=True, backend=counter
    )
    for i in reversed(range(STEPS)):
        step_of(x, i)
        if i == STEPS - 2:  # by now the compiler knows that the step varies; it treats 0 and 1 as constants
            compilations = counter.frame_count
        if i == 2:
            assert counter.frame_count == compilations


def test_numbers_of_numpy(backend, device):
    x, e = pair((3, 4), torch.float32, device)
    table, ids = table_of(0, device), torch.arange(3, device=device)
    expected = ops.diffusion_step(x, e, table, step=2, seed=2**64 - 1, sample_ids=ids)
    for step in (np.int64(2), np.uint8(2)):
        for sample in (x, x.clone().requires_grad_()):
            both_ = both(sample, e, table, step=step, seed=np.uint64(2**64 - 1), sample_ids=ids)
            for actual in both_:
                assert torch.equal(actual[0], expected)


def test_a_clip_is_any_two_numbers(backend, device):
    x, e = pair((3, 4), torch.float32, device)
    table = table_of(0, device)
    expected = ops.diffusion_step(x, e, table, step=2, clip=(-1.0, 1.0))
    for clip in ([-1, 1], 1, np.float32(1.0), (np.float64(-1), np.int64(1))):
        for actual in both(x, e, table, step=2, clip=clip):
            assert torch.equal(actual[0], expected)


def test_raw_operators_pass_opcheck(backend, device, namespace):
    library = getattr(torch.ops, namespace)
    x, e = pair((3, 8), torch.float32, device)
    ids, table = torch.arange(3, device=device), table_of(1, device)
    strided = x.t().contiguous().t()
    for operator in (library.diffusion_step.default, library.diffusion_step_denoised.default):
        opcheck(operator, (x, e, table, 1, None, [e], e, 0, None, None, -1.0, 1.0))
        opcheck(operator, (strided, e.bfloat16(), table, 0, ids, [e], None, 0, ids, ids, -math.inf, math.inf))
    backward = library.diffusion_step_backward.default
    opcheck(backward, (x, e.bfloat16(), table, 1, None, -1.0, 1.0, e, None))
    opcheck(backward, (strided, e, table, 0, ids, -1.0, 1.0, e, x))


def test_functorch_takes_the_reference(backend, device):
    x, e = pair((2, 3, 4), torch.float32, device)
    table = table_of(0, device)
    mapped = torch.vmap(lambda x, e: ops.diffusion_step(x, e, table, step=1, clip=1.0))(x, e)
    close(mapped, ops.diffusion_step(x, e, table, step=1, clip=1.0))
    tangent = torch.func.jvp(lambda x: ops.diffusion_step(x, e, table, step=1), (x,), (torch.ones_like(x),))[1]
    close(tangent, torch.full_like(x, (table[1, 3] + table[1, 2] * table[1, 0]).item()), scale=2)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model_output": torch.zeros(3, 5)}, ValueError, r"model_output has shape \(3, 5\), but expected \(3, 4\)"),
    ({"model_output": torch.zeros(4)}, ValueError, r"model_output has shape \(4,\)"),
    ({"sample": torch.zeros(())}, ValueError, r"sample has shape \(\), but expected \(n, ...\)"),
    ({"sample": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "sample has dtype torch.int64"),
    ({"noise": torch.zeros(3, 4, dtype=torch.int32)}, TypeError, "noise has dtype torch.int32"),
    ({"noise": torch.zeros(3)}, ValueError, r"noise has shape \(3,\)"),
    ({"history": [torch.zeros(3, 4), torch.zeros(2, 4)]}, ValueError, r"history\[1\] has shape \(2, 4\)"),
    ({"coefficients": torch.zeros(5, 7)}, ValueError, r"coefficients has shape \(5, 7\), but expected \(steps, 6\)"),
    ({"coefficients": torch.zeros(6)}, ValueError, r"coefficients has shape \(6,\)"),
    ({"coefficients": torch.zeros(0, 6)}, ValueError, r"coefficients has shape \(0, 6\)"),
    ({"coefficients": torch.zeros(5, 6).double()}, TypeError, "coefficients has dtype torch.float64"),
    ({"step": torch.zeros(3)}, TypeError, "step has dtype torch.float32"),
    ({"step": 1.5}, TypeError, "step is a float"),
    ({"step": torch.zeros(2, dtype=torch.int64)}, ValueError, r"step has shape \(2,\), but expected \(\) or \(3,\)"),
    ({"seed": 1}, ValueError, "sample_ids is None, but expected a value, because seed was given"),
    ({"sample_ids": torch.arange(3)}, ValueError, "seed is None, but expected a value, because sample_ids was given"),
    ({"seed": 1, "sample_ids": torch.arange(4)}, ValueError, r"sample_ids has shape \(4,\), but expected \(3,\)"),
    ({"seed": 2**65, "sample_ids": torch.arange(3)}, ValueError, "seed is 36893488147419103232"),
    ({"seed": 1, "sample_ids": torch.arange(3), "noise": torch.zeros(3, 4)}, ValueError, "noise was given together"),
    ({"clip": -1.0}, ValueError, "clip is -1.0"),
    ({"clip": (1.0, -1.0)}, ValueError, r"clip is \(1.0, -1.0\)"),
    ({"clip": math.nan}, ValueError, "clip is nan"),
    ({"clip": [1]}, ValueError, r"clip is \[1\], but expected a number from 0 or \(low, high\)"),
    ({"clip": [-1, 0, 1]}, ValueError, r"clip is \[-1, 0, 1\]"),
    ({"clip": "ab"}, ValueError, "clip is ab"),
    ({"step": "1"}, TypeError, "step is a str, but expected an int or an int64 tensor"),
]


@pytest.mark.parametrize(("arguments", "error", "sentence"), BAD)
@pytest.mark.parametrize("native", [True, False])
def test_bad_arguments_get_one_sentence(monkeypatch, arguments, error, sentence, native):
    if not native:
        monkeypatch.setattr(_native, "_kernels", {})
    given_ = {"sample": torch.zeros(3, 4), "model_output": torch.zeros(3, 4), "coefficients": torch.zeros(5, 6)}
    given_ |= {"step": 1, **arguments}
    for gradient in (False, True):
        if gradient and given_["sample"].is_floating_point():
            given_["sample"] = given_["sample"].detach().requires_grad_()
        with pytest.raises(error, match=sentence):
            ops.diffusion_step(**given_)


def test_raw_operators_check_what_would_reach_memory(backend, device, namespace):
    library = getattr(torch.ops, namespace)
    x, table, ids = torch.zeros(3, 4, device=device), torch.zeros(5, 6, device=device), torch.arange(3, device=device)

    def call(**changes: Any) -> None:
        arguments = {
            "sample": x, "model_output": x, "coefficients": table, "step": 1, "steps": None, "history": [],
            "noise": None, "seed": 0, "seeds": None, "sample_ids": None, "low": -1.0, "high": 1.0,
        } | changes  # fmt: skip
        library.diffusion_step(**arguments)

    for changes, sentence in [
        ({"model_output": x[:2]}, r"model_output has shape \(2, 4\), but expected \(3, 4\)"),
        ({"noise": x[:2]}, r"noise has shape \(2, 4\)"),
        ({"history": [x]}, r"coefficients has shape \(5, 6\), but expected \(steps, 7\)"),
        ({"history": [x[:2]], "coefficients": torch.zeros(5, 7, device=device)}, r"history has shape \(2, 4\)"),
        ({"coefficients": table.double()}, "coefficients has another dtype than float32"),
        ({"step": 5}, "step is 5, but expected a row of the table, 0 .. 4"),
        ({"step": -1}, "step is -1"),
        ({"steps": ids[:2]}, r"step has shape \(2,\)"),
        ({"steps": ids.int()}, "step has another dtype than int64"),
        ({"sample_ids": ids[:2]}, r"sample_ids has shape \(2,\)"),
        ({"sample_ids": ids, "noise": x}, "noise was given together with sample_ids"),
    ]:
        with pytest.raises(RuntimeError, match=sentence):
            call(**changes)
    with pytest.raises(RuntimeError, match=r"grad_next has shape \(2, 4\)"):
        library.diffusion_step_backward(x, x, table, 0, None, -1.0, 1.0, x[:2], None)


def test_unwritten_output_would_show(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        for shape in SHAPES:
            x, e = (t.requires_grad_() for t in pair(shape, torch.float32, device))
            results = ops.diffusion_step(x, e, table_of(0, device), step=0, clip=1.0, return_denoised=True)
            grads = torch.autograd.grad(sum(r.sum() for r in results), (x, e))
            for tensor in (*results, *grads):
                assert tensor.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_graph_replay(backend, device):
    if backend != "cuda":
        pytest.skip("graphs are captured on a GPU only")
    x, e = pair((64, 3000), torch.float32, device)
    table, ids = table_of(0, device), torch.arange(64, device=device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    ops.diffusion_step(x, e, table, step=step, seed=3, sample_ids=ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.diffusion_step(x, e, table, step=step, seed=3, sample_ids=ids, clip=1.0)
    x.normal_()
    step.fill_(4)
    graph.replay()
    assert torch.equal(y, ops.diffusion_step(x, e, table, step=4, seed=3, sample_ids=ids, clip=1.0))


@pytest.mark.large
def test_more_than_two_to_the_31_elements(backend, device):
    if backend != "cuda":
        pytest.skip("index arithmetic past 2^31 is tested on a GPU only")
    x = torch.zeros(2, 2**30 + 8, dtype=torch.bfloat16, device=device)
    x[1, -1] = 3
    table = torch.tensor([[0.0, 0, 0, 2, 0, 0], [0, 0, 0, 4, 0, 0]], device=device)
    y = ops.diffusion_step(x, x, table, step=torch.tensor([0, 1], device=device))
    assert y[1, -1] == 12
    assert y.count_nonzero() == 1
    assert ops.diffusion_step(x, x, table, step=0)[1, -1] == 6


def test_the_reference_serves_where_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(_native, "_kernels", {})
    x, e = pair((4, 8), torch.float32, torch.device("cpu"))
    table = table_of()
    torch.testing.assert_close(
        ops.diffusion_step(x, e, table, step=0),
        x * (table[0, 3] + table[0, 2] * table[0, 0]) + e * (table[0, 4] + table[0, 2] * table[0, 1]),
    )
