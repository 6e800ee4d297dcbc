"""Philox against its published vectors, and the noise of csrc/noise.h bit for bit on every instruction set."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pygen.ops.noise import (
    TOKEN_STREAM,
    UNIFORM_STREAM,
    noise_reference,
    philox_reference,
    philox_uniform_reference,
    philox_words_reference,
    signed_seed,
)

# kat_vectors of Random123 (Salmon et al. 2011), philox 4x32 10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# Name in /proc/cpuinfo that says whether this machine runs a build.
INSTRUCTION_SETS = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512dq"}

CSRC = Path(__file__).parent.parent / "csrc"


def tensors(numbers: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(number) for number in numbers)


def instruction_sets() -> list[str]:
    if platform.machine() != "x86_64":
        return ["native"]
    return list(INSTRUCTION_SETS)


@pytest.fixture(scope="module", params=instruction_sets())
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Runs tests/noise_program.cpp, built for one instruction set with the flags of CMakeLists.txt."""
    name = request.param
    flags = Path("/proc/cpuinfo").read_text().split() if name in INSTRUCTION_SETS else []
    if name in INSTRUCTION_SETS and INSTRUCTION_SETS[name] not in flags:
        pytest.skip(f"this processor does not run {name}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert compiler, "a C++ compiler is needed: install g++"
    binary = tmp_path_factory.mktemp("noise") / "program"
    options = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-ffp-contract=off"]
    source = CSRC.parent / "tests/noise_program.cpp"
    subprocess.run([compiler, *options, f"-march={name}", f"-I{CSRC}", str(source), "-o", str(binary)], check=True)

    def run(what: str, *numbers: int) -> list[list[str]]:
        command = [str(binary), what, *(str(number % 2**64) for number in numbers)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [line.split() for line in output.splitlines()]

    return run


def bits(values: torch.Tensor) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08x}" for word in values.view(torch.int32).flatten().tolist()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_vectors(counter, key, expected):
    assert tuple(philox_words_reference(tensors(counter), tensors(key)).tolist()) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_vectors_in_the_header(program, counter, key, expected):
    (words,) = program("words", *counter, *key)
    assert tuple(int(word, 16) for word in words) == expected


def test_counter_layout():
    # The third vector, as an address: block, then draw under the stream's two bits, then the sample id's halves.
    (block, draw, low, high), (key0, key1), expected = KNOWN_ANSWERS[2]
    seed = signed_seed(key0 | (key1 << 32))
    sample_id = low | (high << 32)
    arguments = tensors((seed, sample_id)), draw >> 30, tensors((draw & (2**30 - 1), block))
    (seed_, id_), stream, (draw_, block_) = arguments
    assert stream == TOKEN_STREAM
    assert tuple(philox_reference(seed_, id_, stream, draw_, block_).tolist()) == expected
    # Element 4 block + lane is word `lane`, of which a uniform number keeps the upper 24 bits.
    for lane in range(4):
        u = philox_uniform_reference(seed_, id_, stream, draw_, 4 * block_ + lane)
        assert u.item() == (expected[lane] >> 8) / 2**24


def test_uniform_of_the_header(program):
    for seed, sample_id, draw, element in [
        (0, 0, 0, 0),
        (-1, -7, 2**30 - 1, 2**34 - 1),
        (3, 2**62, 5, 6),
        (1, 2, 3, 5),
    ]:
        for stream in (UNIFORM_STREAM, TOKEN_STREAM):
            ((u, fine),) = program("uniform", seed, sample_id, stream, draw, element)
            address = tensors((seed, sample_id)), stream, tensors((draw,))[0]
            (seed_, id_), _, draw_ = address
            assert float(u) == philox_uniform_reference(seed_, id_, stream, draw_, torch.tensor(element)).item()
            words = philox_reference(seed_, id_, stream, draw_, torch.tensor(0)).tolist()
            assert float(fine) == ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53


@pytest.mark.parametrize(("seed", "sample_id", "draw"), [(0, 0, 0), (-5, 2**40 + 3, 77), (2**63 - 1, -1, 2**30 - 1)])
def test_every_instruction_set_gives_the_same_bits(program, seed, sample_id, draw):
    blocks = 20_003
    expected = bits(noise_reference(torch.tensor([sample_id]), (4 * blocks,), seed=seed, draw=draw))
    for lanes in ("normal", "wide"):
        rows = program(lanes, seed, sample_id, draw, 0, blocks)
        assert [word for row in rows for word in row] == expected


def test_later_blocks_are_reached_directly(program):
    rows = program("normal", 9, 4, 2, 1000, 3)
    expected = noise_reference(torch.tensor([4]), (4012,), seed=9, draw=2)[:, 4000:]
    assert [word for row in rows for word in row] == bits(expected)


def test_extreme_words(program):
    from pygen.ops.noise import _normal_pair

    for radius in (0, 1, 2, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF):
        for angle in (0, 1, 0x1FFFFFFF, 0x20000000, 0x40000000, 0x7FFFFFFF, 0x80000000, 0xC0000000, 0xFFFFFFFF):
            ((first, second),) = program("pair", radius, angle)
            pair = torch.stack(_normal_pair(*tensors((radius, angle))))
            assert [first, second] == bits(pair)
            assert pair.isfinite().all()
            length = pair.double().norm().item()
            if radius == 0:
                assert 6.6 < length < 6.67
            if radius >= 0xFFFFFFFE:
                assert length == 0
