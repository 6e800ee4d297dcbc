"""Addressed noise: element i of draw d of sample s comes from word i % 4 of Philox4x32-10(seed; i // 4, d, s).

Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The normal is Box and Muller's (1958).
`csrc/philox.h` has the counter layout; `csrc/noise.h` has the same arithmetic, rounding for rounding, so that this
reference agrees with every kernel in every bit.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pygen import _native

NORMAL_STREAM, UNIFORM_STREAM, TOKEN_STREAM = 0, 1, 2  # the top two bits of the counter's draw word
DRAW_LIMIT = 2**30
ELEMENT_LIMIT = 2**34  # 2^32 blocks of four

_WORD = 0xFFFFFFFF
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def philox_reference(seed: Tensor, sample_ids: Tensor, stream: int, draw: Tensor, block: Tensor) -> Tensor:
    """The four 32-bit words of Philox4x32-10 at an address, as int64 in 0 .. 2^32-1.

    seed, sample_ids, draw, block: int64 tensors that broadcast to a shape S; draw in 0 .. 2^30-1 (higher bits are
        dropped), block in 0 .. 2^32-1.
    stream: 0 normal, 1 uniform, 2 token.

    Returns int64 (*S, 4).
    """
    word0 = block & _WORD
    word1 = (draw & (DRAW_LIMIT - 1)) | (stream << 30)
    word2, word3 = sample_ids & _WORD, (sample_ids >> 32) & _WORD
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    return philox_words_reference((word0, word1, word2, word3), (key0, key1))


def philox_words_reference(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Philox4x32-10 of a counter of four words under a key of two, all int64 in 0 .. 2^32-1; returns (..., 4)."""
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(10):
        # The product wraps modulo 2^64 as two's complement, so both halves come out right after the mask.
        product0, product1 = word0 * 0xD2511F53, word2 * 0xCD9E8D57
        word0, word2 = ((product1 >> 32) & _WORD) ^ word1 ^ key0, ((product0 >> 32) & _WORD) ^ word3 ^ key1
        word1, word3 = product1 & _WORD, product0 & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return torch.stack((word0, word1, word2, word3), dim=-1)  # ten rounds broadcast each to the full shape


def philox_uniform_reference(seed: Tensor, sample_ids: Tensor, stream: int, draw: Tensor, element: Tensor) -> Tensor:
    """One uniform number in [0, 1) of 24 bits, float32, per address; the int64 arguments broadcast.

    `csrc/philox.h` has the same function, `philox_uniform`.
    """
    words = philox_reference(seed, sample_ids, stream, draw, element >> 2)
    lane = (element & 3).expand(words.shape[:-1]).unsqueeze(-1)
    return _uniform_of_words(words.gather(-1, lane).squeeze(-1))


def noise_reference(
    sample_ids: Tensor,
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    draw: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The specification of `noise` in PyTorch operations; equal to it in every bit."""
    words = _words(sample_ids, shape, seed, draw, NORMAL_STREAM, dtype)
    pair0 = _normal_pair(words[..., 0], words[..., 1])
    pair1 = _normal_pair(words[..., 2], words[..., 3])
    return _shaped(torch.stack((*pair0, *pair1), dim=-1), sample_ids, shape, dtype)


def uniform_reference(
    sample_ids: Tensor,
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    draw: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The specification of `uniform` in PyTorch operations; equal to it in every bit."""
    words = _words(sample_ids, shape, seed, draw, UNIFORM_STREAM, dtype)
    return _shaped(_uniform_of_words(words), sample_ids, shape, dtype)


def noise(
    sample_ids: Tensor,
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    draw: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise by address: a pure function of (seed, sample id, draw, element).

    A sample gets the same bits on any device and instruction set, in any batch, on any number of ranks and threads,
    and noise of shape (8,) is the beginning of noise of shape (20,) under the same address.

    sample_ids: int64 (n,), on the device where the noise is wanted.
    shape: the shape of one sample's noise, at most 2^34 elements; () gives one number per sample.
    seed: an int of at most 64 bits (-1 and 2^64 - 1 are the same seed), or an int64 tensor, 0-dim or (n,).
    draw: which of the sample's draws, 0 .. 2^30 - 1, or an int64 tensor, 0-dim or (n,), of which the lower 30 bits
        count.
    dtype: float32; float64 (the float32 numbers, widened), bfloat16 or float16 (rounded).

    Returns (n, *shape), within +-6.67. Raises TypeError for a wrong dtype, ValueError for a wrong shape or a draw or
    seed out of range. It has no gradient.

    Source: Philox4x32-10 of Salmon et al. 2011 (SC'11), and Box and Muller 1958.
    """
    return _generate(sample_ids, shape, seed, draw, dtype, noise_reference, uniform=False)


def uniform(
    sample_ids: Tensor,
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    draw: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform noise in [0, 1) by address, 24 bits a number; arguments as in `noise`, from a stream of its own.

    bfloat16 and float16 round to nearest, which can reach 1.
    """
    return _generate(sample_ids, shape, seed, draw, dtype, uniform_reference, uniform=True)


def _generate(
    sample_ids: Tensor,
    shape: Sequence[int],
    seed: int | Tensor,
    draw: int | Tensor,
    dtype: torch.dtype,
    reference: Callable[..., Tensor],
    *,
    uniform: bool,
) -> Tensor:
    seed, draw = plain_number("seed", seed), plain_number("draw", draw)
    kernels = _native.kernels_for(sample_ids)
    if kernels is None:
        return reference(sample_ids, shape, seed=seed, draw=draw, dtype=dtype)
    check_address(sample_ids, seed, draw)
    _check_output(shape, dtype)
    seed, seeds = split_seed(seed)
    draw, draws = (0, draw) if isinstance(draw, Tensor) else (draw, None)
    out: Tensor = kernels.noise(sample_ids, shape, seed, seeds, draw, draws, dtype, uniform)
    return out


@_native.register_fake("noise")
def _noise_fake(
    sample_ids: Tensor, shape: Sequence[int], seed: int, seeds: Tensor | None, draw: int, draws: Tensor | None,
    dtype: torch.dtype, uniform: bool,
) -> Tensor:  # fmt: skip
    return sample_ids.new_empty((sample_ids.shape[0], *shape), dtype=dtype)


def check_address(sample_ids: Tensor, seed: int | Tensor, draw: int | Tensor) -> None:
    """Raise what is wrong with an address of noise, in one sentence."""
    if sample_ids.dtype != torch.int64:
        raise TypeError(f"sample_ids has dtype {sample_ids.dtype}, but expected torch.int64")
    if sample_ids.dim() != 1:
        raise ValueError(f"sample_ids has shape {tuple(sample_ids.shape)}, but expected (n,)")
    check_number("seed", seed, sample_ids, -(2**63), 2**64)
    check_number("draw", draw, sample_ids, 0, DRAW_LIMIT)


def check_number(name: str, value: int | Tensor, sample_ids: Tensor, low: int, high: int) -> None:
    """Raise what is wrong with an int in low .. high - 1, or an int64 tensor of it, 0-dim or one per sample."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {value.dtype}, but expected torch.int64")
        if value.dim() != 0 and value.shape != sample_ids.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but expected () or {tuple(sample_ids.shape)}")
        if value.device != sample_ids.device:
            raise ValueError(f"{name} is on {value.device}, but expected {sample_ids.device}, where sample_ids is")
    elif not low <= value < high:
        raise ValueError(f"{name} is {value}, but expected a number in {low} .. {high - 1}")


def plain_number(name: str, value: int | Tensor) -> int | Tensor:
    """A tensor or an int as it is, and the integer of another library, such as NumPy's, as an int."""
    if isinstance(value, (int, Tensor)):  # first, because the compiler would take operator.index for a constant
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is a {type(value).__name__}, but expected an int or an int64 tensor") from None


def signed_seed(seed: int) -> int:
    """The same 64 bits as a signed number, which is what an operator takes."""
    return seed if seed < 2**63 else seed - 2**64


def split_seed(seed: int | Tensor) -> tuple[int, Tensor | None]:
    """A seed as the two arguments of an operator: a signed number, and the tensor that takes precedence."""
    return (0, seed) if isinstance(seed, Tensor) else (signed_seed(seed), None)


def _check_output(shape: Sequence[int], dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype}, but expected float32, float64, bfloat16 or float16")
    if any(size < 0 for size in shape) or math.prod(shape) > ELEMENT_LIMIT:
        raise ValueError(f"shape is {tuple(shape)}, but expected sizes from 0 with at most 2^34 elements")


def _words(
    sample_ids: Tensor,
    shape: Sequence[int],
    seed: int | Tensor,
    draw: int | Tensor,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    seed, draw = plain_number("seed", seed), plain_number("draw", draw)
    check_address(sample_ids, seed, draw)
    _check_output(shape, dtype)
    seeds = seed if isinstance(seed, Tensor) else sample_ids.new_tensor(signed_seed(seed))
    draws = draw if isinstance(draw, Tensor) else sample_ids.new_tensor(draw)
    blocks = torch.arange((math.prod(shape) + 3) // 4, device=sample_ids.device)
    return philox_reference(seeds.reshape(-1, 1), sample_ids.reshape(-1, 1), stream, draws.reshape(-1, 1), blocks)


def _shaped(values: Tensor, sample_ids: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    n, elements = sample_ids.shape[0], math.prod(shape)
    return values.reshape(n, (elements + 3) // 4 * 4)[:, :elements].to(dtype).reshape(n, *shape)


def _uniform_of_words(words: Tensor) -> Tensor:
    return (words >> 8).to(torch.float32) * 2.0**-24


def _normal_pair(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    # csrc/noise.h says why each step is as it is; every operation here is one float32 rounding there.
    u = ((radius_word >> 1).to(torch.float32) + 0.5) * 2.0**-31
    mantissa, power = torch.frexp(u)
    below = mantissa < 0.70710676908493042  # the float32 at sqrt(1/2), 0x3F3504F3
    exponent = (power - below.to(power.dtype)).to(torch.float32)
    t = torch.where(below, mantissa * 2.0, mantissa) - 1.0
    square = t * t
    p = t * -0.17400719225406647 + 0.2853495180606842
    p = p * t + -0.2982957363128662
    p = p * t + 0.331551730632782
    p = p * t + -0.39926123619079590
    p = p * t + 0.5000267624855042
    p = p * t + -0.6666781902313232
    total = exponent * -1.3862943649291992 + (p * t * square + square + t * -2.0)
    # PyTorch's float32 square root on the CPU may be one unit off; from float64 it rounds as IEEE 754 asks.
    radius = total.double().sqrt().float()

    low = (angle_word << 2) & _WORD
    f = (low - ((low & 0x80000000) << 1)).to(torch.float32) * 2.0**-32
    square = f * f
    sine = (((square * -0.004601669 + 0.07968004) * square + -0.6459635) * square + 1.5707964) * f
    cosine = ((square * -0.020426251 + 0.25360635) * square + -1.233698) * square + 1.0
    quadrant = angle_word >> 30
    odd = (quadrant & 1).bool()
    first = torch.where(odd, sine, cosine)
    second = torch.where(odd, cosine, sine)
    first = torch.where((quadrant == 1) | (quadrant == 2), -first, first)
    second = torch.where(quadrant >= 2, -second, second)
    return radius * first, radius * second
