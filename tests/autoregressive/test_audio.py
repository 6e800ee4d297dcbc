"""WAV files and the mu-law."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pygen.autoregressive import audio


@given(levels=st.integers(2, 1024))
def test_the_levels_survive_the_way_there_and_back(levels: int) -> None:
    grid = torch.arange(levels, dtype=torch.float64) * (2 / (levels - 1)) - 1
    sound = audio.expand(grid, levels)
    assert sound[0] == pytest.approx(-1)
    assert sound[-1] == pytest.approx(1)
    torch.testing.assert_close(audio.compress(sound, levels), grid, atol=1e-9, rtol=0)


def test_mu_law_is_that_of_the_formula_and_finer_near_zero() -> None:
    x = torch.tensor([0.5, -0.01], dtype=torch.float64)
    expected = torch.tensor([0.875703, -0.228473], dtype=torch.float64)  # ln(1 + 255 |x|) / ln 256, with the sign of x
    torch.testing.assert_close(audio.compress(x), expected, atol=1 / 255, rtol=0)
    sound = torch.linspace(-1, 1, 10001, dtype=torch.float64)
    error = (audio.expand(audio.compress(sound)) - sound).abs()
    assert error.max() < 0.025
    assert error[sound.abs() < 0.01].max() < 5e-4
    assert torch.equal(audio.compress(torch.tensor([-3.0, 3.0])), torch.tensor([-1.0, 1.0]))
    with pytest.raises(ValueError, match="levels is 1"):
        audio.compress(x, 1)


@pytest.mark.parametrize(
    ("width", "data", "expected"),
    [
        (1, bytes([0, 128, 255]), [-1.0, 0.0, 127 / 128]),
        (2, struct.pack("<3h", -32768, 0, 32767), [-1.0, 0.0, 32767 / 32768]),
        (3, bytes([0, 0, 0x80, 0, 0, 0, 0xFF, 0xFF, 0x7F]), [-1.0, 0.0, 1 - 2**-23]),
        (4, struct.pack("<3i", -(2**31), 0, 2**30), [-1.0, 0.0, 0.5]),
    ],
)
def test_every_width_is_read(tmp_path: Path, width: int, data: bytes, expected: list[float]) -> None:
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes(data)
    sound, rate = audio.read_wav(path)
    assert (sound.tolist(), rate) == ([pytest.approx(expected)], 8000)


@pytest.mark.parametrize("channels", [1, 2])
def test_what_is_written_is_read(tmp_path: Path, channels: int) -> None:
    sound = torch.rand(channels, 100) * 2 - 1
    audio.write_wav(tmp_path / "sound.wav", sound, 16000)
    again, rate = audio.read_wav(tmp_path / "sound.wav")
    assert rate == 16000
    torch.testing.assert_close(again, sound, atol=1e-4, rtol=0)


def test_what_was_read_is_written_as_it_was(tmp_path: Path) -> None:
    every = torch.arange(-(2**15), 2**15).reshape(2, -1) / 2**15
    audio.write_wav(tmp_path / "sound.wav", every, 8000)
    again, _ = audio.read_wav(tmp_path / "sound.wav")
    assert torch.equal(again, every)
    audio.write_wav(tmp_path / "loud.wav", torch.tensor([-3.0, -1.0, 1.0, 3.0]), 8000)
    loud, _ = audio.read_wav(tmp_path / "loud.wav")
    assert loud.tolist() == [[-1.0, -1.0, 1 - 2**-15, 1 - 2**-15]]


def test_bad_files_and_arguments_are_named(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    path.write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"sound.wav is not a WAV file"):
        audio.read_wav(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"sound.wav is not a WAV file of PCM samples: it ends too early"):
        audio.read_wav(path)
    with pytest.raises(ValueError, match=r"sound has shape \(1, 2, 3\)"):
        audio.write_wav(path, torch.zeros(1, 2, 3), 8000)
    with pytest.raises(ValueError, match="sound has values that are NaN"):
        audio.write_wav(path, torch.tensor([0.0, torch.nan]), 8000)
    with pytest.raises(ValueError, match="rate is 0"):
        audio.write_wav(path, torch.zeros(3), 0)
