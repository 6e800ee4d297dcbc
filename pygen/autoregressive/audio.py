"""Sound for WaveNet: WAV files, and the mu-law that makes few levels sound like many.

f(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu), with mu = levels - 1 (ITU-T G.711; van den Oord et al. 2016,
arXiv:1609.03499, section 2.2).
"""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def compress(sound: Tensor, levels: int = 256) -> Tensor:
    """Samples in [-1, 1] to the compressed ones in [-1, 1], rounded to `levels` values 2 k / (levels - 1) - 1."""
    _check_levels(levels)
    mu, top = levels - 1, levels - 1
    x = sound.clamp(-1, 1)
    compressed = x.sign() * (mu * x.abs()).log1p() / math.log1p(mu)
    return ((compressed + 1) * (top / 2)).round() * (2 / top) - 1


def expand(compressed: Tensor, levels: int = 256) -> Tensor:
    """Samples in [-1, 1] from compressed ones, the way back from `compress` but for the rounding."""
    _check_levels(levels)
    mu = levels - 1
    return compressed.sign() * (compressed.abs() * math.log1p(mu)).expm1() / mu


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """The sound of a WAV file, float32 (channels, samples) in [-1, 1], and its rate in samples per second.

    PCM of 8 (unsigned), 16, 24 or 32 bits. ValueError: the file is no such WAV file.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, count = file.getparams()[:4]
            data = file.readframes(count)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is not a WAV file of PCM samples: {str(error) or 'it ends too early'}") from None
    if width == 1:
        values = np.frombuffer(data, np.uint8).astype(np.int64) - 128
    elif width == 3:
        parts = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int64)
        values = parts[:, 0] | parts[:, 1] << 8 | parts[:, 2] << 16
        values -= (values >> 23) << 24
    elif width in (2, 4):
        values = np.frombuffer(data, f"<i{width}").astype(np.int64)
    else:
        raise ValueError(f"{path} has {8 * width} bits a sample, but expected 8, 16, 24 or 32")
    samples = torch.from_numpy(values.reshape(-1, channels).T / 2.0 ** (8 * width - 1))
    return samples.float().contiguous(), rate


def write_wav(path: str | Path, sound: Tensor, rate: int) -> None:
    """Write sound (channels, samples) or (samples,) in [-1, 1] as 16-bit PCM of `rate` samples per second.

    Rounded to multiples of 2^-15, as `read_wav` gives them, up to 1 - 2^-15: what was read from 16 bits is written as
    it was.

    ValueError: sound has another shape or NaN, or rate is less than 1.
    """
    if sound.dim() not in (1, 2) or (sound.dim() == 2 and not len(sound)):
        raise ValueError(f"sound has shape {tuple(sound.shape)}, but expected (channels, samples) or (samples,)")
    if rate < 1:
        raise ValueError(f"rate is {rate}, but expected a number of samples per second of at least 1")
    rows = torch.atleast_2d(sound.detach().cpu().double())
    if bool(rows.isnan().any()):
        raise ValueError("sound has values that are NaN, but expected values in [-1, 1]")
    values = (rows * 2**15).round().clamp(-(2**15), 2**15 - 1).numpy().T.astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(rows))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())


def _check_levels(levels: int) -> None:
    if levels < 2:
        raise ValueError(f"levels is {levels}, but expected at least 2")
