"""The fibers that run CUDA kernels on the CPU: right numbers, and each planted fault is caught."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX", "g++")
ORDERS = ("ascending", "descending")
FLAGS = {
    "plain": ["-O1", "-Wall", "-Wextra", "-Werror"],
    # Ubuntu's default, under which glibc refuses to jump from stack to stack.
    "fortified": ["-O2", "-D_FORTIFY_SOURCE=2"],
    "address": ["-O1", "-g", "-fsanitize=address"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}
LIBRARY_FLAGS = {f"{build}_library": [*FLAGS[build], "-fPIC", "-shared"] for build in ("address", "thread")}

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no host compiler {COMPILER}")


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """program(source, build) is the path of the executable, compiled at its first use."""
    folder = tmp_path_factory.mktemp("simt")
    built = {}

    def compile_once(source, build):
        key = source, build
        if key not in built:
            out = folder / f"{source}_{build}"
            flags = (FLAGS | LIBRARY_FLAGS)[build]
            command = [COMPILER, "-std=c++20", *flags, f"-I{CSRC}", "-x", "c++"]
            command += [str(HERE / f"{source}.cu"), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            missing = re.search(r"cannot find.*lib[at]san|unsupported option", done.stderr)
            if done.returncode != 0 and "sanitize" in " ".join(command) and missing:
                pytest.skip(f"{COMPILER} has no {build} sanitizer")
            assert done.returncode == 0, done.stderr
            built[key] = out
        return built[key]

    return compile_once


def run(path, *arguments, order="ascending"):
    """What the program says on both streams. It has to end by itself."""
    command = [str(path), *arguments]
    if path.name.endswith("_thread") and shutil.which("setarch"):
        # ThreadSanitizer's memory map leaves no room for much address randomisation.
        command = ["setarch", "-R", *command]
    environment = os.environ | {
        "PYGEN_SIMT_ORDER": order,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "exitcode=66",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    text = done.stdout + done.stderr
    if path.name.endswith("_thread") and re.search(r"unexpected memory mapping|setarch: failed", text):
        pytest.skip("ThreadSanitizer cannot lay out its memory here")
    assert done.returncode >= 0, f"signal {-done.returncode}: {text}"
    return text


def run_in_python(library, preload, *arguments):
    """The same for a library that Python loads: the sanitizer has to be there before Python is."""
    names = ["faults", *arguments]
    script = (
        f"import ctypes; names = {names!r}; "
        f"ctypes.CDLL({str(library)!r}).main(len(names), "
        "(ctypes.c_char_p * len(names))(*[name.encode() for name in names]))"
    )
    found = [subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True) for name in preload]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(done.stdout.strip() for done in found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
    }
    command = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run(
        [*command, sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    text = done.stdout + done.stderr
    if re.search(r"unexpected memory mapping|setarch: failed", text):
        pytest.skip("this machine does not let a program fix its memory layout")
    return text


def numbers(text):
    return [float(word) for word in text.splitlines()[-1].split()]


def lines_of(fault):
    source = (HERE / "faults.cu").read_text().splitlines()
    found = [i for i, line in enumerate(source, 1) if line.endswith(f"// fault: {fault}")]
    assert found
    return found


def reported_lines(report):
    """The innermost lines of faults.cu in each stack of a sanitizer's report."""
    return {int(line) for line in re.findall(r"#0 .*faults\.cu:(\d+)", report)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("build", FLAGS)
def test_correct_kernels(program, build, order):
    assert run(program("correct", build), order=order) == "0 wrong\n"


def test_unknown_order_is_refused(program):
    text = run(program("faults", "plain"), "barrier", order="sideways")
    assert "PYGEN_SIMT_ORDER is 'sideways', expected ascending or descending" in text


@pytest.mark.parametrize("fault", ["past_global", "past_static", "past_dynamic", "past_local"])
def test_overflow_is_found(program, fault):
    report = run(program("faults", "address"), fault)
    assert "AddressSanitizer" in report and "buffer-overflow" in report
    assert lines_of(fault)[0] in reported_lines(report)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "fault",
    [
        "no_barrier",
        "no_barrier_one_order",
        "no_second_barrier",
        "shuffle_for_barrier",
        "blocks_collide",
    ],
)
def test_race_is_found(program, fault, order):
    report = run(program("faults", "thread"), fault, order=order)
    assert "ThreadSanitizer: data race" in report
    assert set(lines_of(fault)) == reported_lines(report)


@pytest.mark.parametrize("order", ORDERS)
def test_no_race_is_reported_where_none_is(program, order):
    names = ["barrier", "barrier_one_order", "syncwarp", "barrier"]
    assert "WARNING" not in run(program("faults", "thread"), *names, order=order)


@pytest.mark.parametrize(
    "with_barrier, without",
    [("barrier", "no_barrier"), ("barrier_one_order", "no_barrier_one_order")],
)
def test_missing_barrier_shows_in_the_numbers_of_one_order(program, with_barrier, without):
    faults = program("faults", "plain")
    right = [numbers(run(faults, with_barrier, order=order)) for order in ORDERS]
    assert right[0] == right[1]
    assert any(numbers(run(faults, without, order=order)) != right[0] for order in ORDERS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "fault, sentence",
    [
        ("exited_lane", "which has exited"),
        ("unnamed_lane", "which its mask does not name"),
        ("own_lane_unnamed", "does not name its own lane"),
        ("different_masks", "with mask"),
        ("warp_against_block", "which stands at a block barrier"),
        ("two_barriers", "stand at different block barriers"),
        ("bad_width", "not a power of two"),
    ],
)
def test_misuse_is_raised_with_its_lines(program, fault, sentence, order):
    # The launch after the fault must not notice it.
    text = run(program("faults", "plain"), fault, "barrier", order=order)
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert sentence in error
    assert set(lines_of(fault)) == {int(line) for line in re.findall(r"faults\.cu:(\d+)", error)}
    assert numbers(text) == [float(i) for i in range(64, 0, -1)]


@pytest.mark.parametrize("build", ["address", "thread"])
def test_sanitizers_stay_quiet_after_a_deadlock(program, build):
    names = ["warp_against_block", "barrier", "different_masks", "barrier", "throws", "syncwarp"]
    text = run(program("faults", build), *names)
    assert text.count("error: ") == 3
    assert "Sanitizer" not in text


@pytest.mark.parametrize(
    "build, preload, fault",
    [
        ("address", ["libasan.so"], "past_static"),
        ("thread", ["libtsan.so"], "no_barrier"),
    ],
)
def test_faults_are_found_in_a_library_that_python_loads(program, build, preload, fault):
    library = program("faults", f"{build}_library")
    quiet = run_in_python(library, preload, "barrier", "syncwarp")
    assert "Sanitizer" not in quiet and "64 63 62" in quiet
    report = run_in_python(library, preload, fault)
    assert "Sanitizer" in report
    assert lines_of(fault)[0] in reported_lines(report)


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("no_threads", "block is (0, 1, 1), expected 1 to 1024 threads"),
        ("many_threads", "block is (32, 33, 1), expected 1 to 1024 threads"),
        ("tall_grid", "grid is (1, 65536, 1), expected"),
        ("deep_grid", "grid is (1, 1, 65536), expected"),
        ("much_shared", "101377 bytes of shared memory, expected 101376 at most"),
        ("large_static", "49156 bytes of static"),
        ("throws", "thread (3, 0, 0) of block (0, 0, 0) threw: no kernel should throw"),
    ],
)
def test_limits_are_raised(program, name, sentence):
    assert sentence in run(program("faults", "plain"), name)


def test_empty_grid_is_skipped(program):
    assert "error" not in run(program("faults", "plain"), "empty_grid")


@pytest.mark.parametrize("order", ORDERS)
def test_unwritten_shared_memory_is_nan(program, order):
    values = numbers(run(program("faults", "plain"), "unwritten", order=order))
    assert [i for i, value in enumerate(values) if value != 1] == [5]
    assert values[5] != values[5]


def test_correct_kernels_compile_for_cuda(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    include = Path(sysconfig.get_path("purelib")) / "torch" / "include"
    if not include.is_dir():
        pytest.skip("no torch headers beside this Python")
    command = [nvcc, "-std=c++20", "-arch=sm_90", "-DUSE_CUDA", "-c", str(HERE / "correct.cu")]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{CSRC}", f"-I{include}"]
    done = subprocess.run([*command, "-o", str(tmp_path / "correct.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
