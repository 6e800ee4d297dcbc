"""scalar.h against the system's libm in double, over a sweep of all float32."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent.parent / "csrc"

# The largest error in units in the last place that each may have where its result is normal: what was measured, and
# a little for the contractions of other compilers.
BOUNDS = {"exp": 1.1, "log": 1.0, "tanh": 1.4, "sigmoid": 2.5, "softplus": 2.0, "atan": 1.9, "log1p_unit": 1.25}

PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include <cstring>
#include "scalar.h"
using namespace pygen::scalar;

template <class Ours, class Exact>
void sweep(const char* name, Ours ours, Exact exact, float low, float high) {
  double worst = 0;
  float at = 0;
  long wrong = 0;
  constexpr uint32_t kStep = STEP;
  float x[1024], y[1024];
  for (uint64_t first = 0; first < (1ull << 32); first += 1024ull * kStep) {
    for (int i = 0; i < 1024; ++i) x[i] = float_of(static_cast<uint32_t>(first + static_cast<uint64_t>(i) * kStep));
    for (int i = 0; i < 1024; ++i) y[i] = ours(x[i]);
    for (int i = 0; i < 1024; ++i) {
      if (x[i] < low || x[i] > high) continue;  // outside the domain; a NaN is in every domain
      const double truth = exact(static_cast<double>(x[i]));
      if (std::isnan(truth)) { wrong += !std::isnan(y[i]); continue; }
      const float rounded = static_cast<float>(truth);
      if (std::isinf(rounded)) { wrong += y[i] != rounded; continue; }
      if (std::isnan(y[i])) { wrong += 1; continue; }
      if (std::fabs(truth) < 1.2e-38) { wrong += std::fabs(y[i] - truth) > 1.2e-38; continue; }
      int exponent;
      std::frexp(rounded, &exponent);
      const double error = std::fabs(y[i] - truth) / std::ldexp(1.0, exponent - 24);
      if (error > worst) { worst = error; at = x[i]; }
    }
  }
  std::printf("%s %.4f %.9g %ld\n", name, worst, at, wrong);
}

int main() {
  const float inf = INFINITY;
  sweep("exp", [](float v) { return exp(v); }, [](double v) { return ::exp(v); }, -inf, inf);
  sweep("log", [](float v) { return log(v); }, [](double v) { return ::log(v); }, -inf, inf);
  sweep("tanh", [](float v) { return tanh(v); }, [](double v) { return ::tanh(v); }, -inf, inf);
  sweep("sigmoid", [](float v) { return sigmoid(v); }, [](double v) { return 1 / (1 + ::exp(-v)); }, -inf, inf);
  sweep("softplus", [](float v) { return softplus(v); },
        [](double v) { return (v > 0 ? v : 0) + ::log1p(::exp(-std::fabs(v))); }, -inf, inf);
  sweep("atan", [](float v) { return atan(v); }, [](double v) { return ::atan(v); }, -inf, inf);
  sweep("log1p_unit", [](float v) { return log1p_unit(v); }, [](double v) { return ::log1p(v); }, 0.0f, 1.0f);
}
"""


@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
def test_every_function_over_the_floats(tmp_path, march):
    compiler = shutil.which("c++")
    assert compiler, "a C++ compiler is what pygen is built with"
    (tmp_path / "sweep.cpp").write_text(PROGRAM)
    # Every 61st float: all exponents, 70 million values, in seconds.
    subprocess.run(
        [compiler, "-std=c++20", "-O3", f"-march={march}", "-fno-math-errno", "-fno-trapping-math", "-DSTEP=61",
         f"-I{SOURCES}", str(tmp_path / "sweep.cpp"), "-o", str(tmp_path / "sweep")],
        check=True,
    )  # fmt: skip
    out = subprocess.run([str(tmp_path / "sweep")], check=True, capture_output=True, text=True).stdout
    found = {}
    for line in out.splitlines():
        name, worst, at, wrong = line.split()
        found[name] = float(worst)
        assert int(wrong) == 0, f"{name} is wrong on {wrong} special values: {line}"
        assert float(worst) <= BOUNDS[name], f"{name} errs by {worst} ulp at {at}"
    assert found.keys() == BOUNDS.keys()
