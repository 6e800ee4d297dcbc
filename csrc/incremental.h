// A convolutional network as a program that computes each element once, when the elements of the sample that it depends
// on are there (Ramachandran et al. 2017, "Fast generation for convolutional autoregressive models", arXiv:1704.06001).
//
// pygen/ops/incremental_program.py says what the sections of a program mean; here is how they are read, and what one
// pointwise instruction does to one element. No torch here.
#pragma once

#include "scalar.h"

namespace pygen::incremental {

// In the order of KINDS, SPACES, and UNARY + BINARY in pygen/ops/incremental_program.py.
enum class Kind : int32_t { kLinear, kPointwise, kNorm, kLookup, kAttention };
constexpr int32_t kKinds = 5;

enum class Space : int32_t { kState, kWeights, kConditions };
constexpr int32_t kSpaces = 3;

enum class Function : int32_t {
  kNeg,
  kExp,
  kLog,
  kTanh,
  kSigmoid,
  kRelu,
  kAbs,
  kSqrt,
  kRsqrt,
  kSilu,
  kGelu,
  kGeluTanh,
  kElu,
  kLeakyRelu,
  kSoftplus,
  kClamp,
  kScale,
  kAdd,
  kSub,
  kMul,
  kDiv,
  kMaximum,
  kMinimum,
  kFill
};
constexpr int32_t kUnaryFunctions = 17, kFunctions = 24;

constexpr int32_t kNowhere = -2147483647 - 1;  // a row or column that is zero
constexpr int32_t kNoTable = -1;
constexpr int64_t kLanes = 16;          // channels are stored in whole vectors of so many
constexpr int32_t kMostRegisters = 32;  // sources and instructions of a pointwise operation
constexpr int64_t kPanel = 64;          // output channels whose weights lie together, for each input in turn

struct Operation {
  Kind kind;
  int32_t grid, out, first_source, sources, channels, weights, first_instruction, instructions, heads, first_key,
      last_key;
};

// Channels at each site of a grid; addresses are rows[y] + columns[x] + offset in their space.
struct Source {
  Space space;
  int32_t rows, columns, offset, count, gather, height, width;
};

struct Instruction {
  Function function;
  int32_t a, b, numbers;
};

struct Task {
  int32_t operation, row, column, count;
};

struct Shape {
  int32_t height, width;
};

struct Header {
  int32_t steps, channels, height, width, vocabulary, state, conditions, weights, grids, operations, sources,
      instructions, templates, tasks, tables, widest, checksum;
};
constexpr int64_t kHeader = sizeof(Header) / sizeof(int32_t);

struct Program {
  Header header;
  const Shape* grids;
  const Operation* operations;
  const Source* sources;
  const Instruction* instructions;
  const int32_t* templates;
  const Task* tasks;
  const int32_t* steps;
  const int32_t* draws;   // of each channel of the sample, the source of its logits
  const int32_t* writes;  // and the source that says where its elements are
  const int32_t* tables;
};

// The length that a header asks for.
inline int64_t length_of(const Header& header) {
  const auto whole = [](int32_t n) { return static_cast<int64_t>(n); };
  return kHeader + 2 * whole(header.grids) + 12 * whole(header.operations) + 8 * whole(header.sources) +
         4 * whole(header.instructions) + whole(header.templates) + 1 + 4 * whole(header.tasks) + whole(header.steps) +
         2 * whole(header.channels) + whole(header.tables);
}

// The program with this header whose code is at an address, which need not be the host's.
inline Program program_at(const int32_t* code, const Header& header) {
  Program program{};
  program.header = header;
  program.grids = reinterpret_cast<const Shape*>(code + kHeader);
  program.operations = reinterpret_cast<const Operation*>(program.grids + header.grids);
  program.sources = reinterpret_cast<const Source*>(program.operations + header.operations);
  program.instructions = reinterpret_cast<const Instruction*>(program.sources + header.sources);
  program.templates = reinterpret_cast<const int32_t*>(program.instructions + header.instructions);
  program.tasks = reinterpret_cast<const Task*>(program.templates + header.templates + 1);
  program.steps = reinterpret_cast<const int32_t*>(program.tasks + header.tasks);
  program.draws = program.steps + header.steps;
  program.writes = program.draws + header.channels;
  program.tables = program.writes + header.channels;
  return program;
}

PYGEN_INLINE int64_t padded(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

// Where a source lies at a site of the grid that it is read from, -1 for zeros.
PYGEN_INLINE int64_t address(const Program& program, const Source& source, int64_t y, int64_t x) {
  const int32_t row = program.tables[source.rows + y], column = program.tables[source.columns + x];
  if (row == kNowhere || column == kNowhere) return -1;
  return int64_t{row} + column + source.offset;
}

// The site of a step, on a grid of this shape.
PYGEN_INLINE int64_t row_at(const Header& header, const Shape& grid, int64_t step) {
  return step / header.channels / header.width * grid.height / header.height;
}
PYGEN_INLINE int64_t column_at(const Header& header, const Shape& grid, int64_t step) {
  return step / header.channels % header.width * grid.width / header.width;
}

// e^x - 1 for x <= 0, to rounding however small x is: with x = n ln 2 + r, 2^n (e^r - 1) + (2^n - 1).
PYGEN_INLINE float expm1_below(float x) {
  const scalar::PowerOfE power = scalar::power_of_e(scalar::at_least(x, -30.0f));
  const float scale = scalar::power_of_2(power.n);
  return scale * power.rest + (scale - 1.0f);
}
PYGEN_INLINE double expm1_below(double x) { return ::expm1(x); }

// A function of one or two numbers, with two numbers of its own.
template <Function F, class T>
PYGEN_INLINE T apply(T a, T b, T first, T second) {
  using scalar::pick;
  if constexpr (F == Function::kNeg) return -a;
  if constexpr (F == Function::kExp) return scalar::exp(a);
  if constexpr (F == Function::kLog) return scalar::log(a);
  if constexpr (F == Function::kTanh) return scalar::tanh(a);
  if constexpr (F == Function::kSigmoid) return scalar::sigmoid(a);
  if constexpr (F == Function::kRelu) return scalar::at_least(a, T(0));
  if constexpr (F == Function::kAbs) return scalar::abs(a);
  if constexpr (F == Function::kSqrt) return std::sqrt(a);
  if constexpr (F == Function::kRsqrt) return T(1) / std::sqrt(a);
  if constexpr (F == Function::kSilu) return a * scalar::sigmoid(a);
  if constexpr (F == Function::kGelu) return T(0.5) * a * (T(1) + std::erf(a * T(0.70710678118654752440)));
  if constexpr (F == Function::kGeluTanh) {
    return T(0.5) * a * (T(1) + scalar::tanh(T(0.79788456080286535588) * (a + T(0.044715) * a * a * a)));
  }
  if constexpr (F == Function::kElu) {
    const T below = first * expm1_below(scalar::at_most(a, T(0))), above = second * a;
    return pick(a > T(0), above, below);
  }
  if constexpr (F == Function::kLeakyRelu) return pick(a > T(0), a, first * a);
  if constexpr (F == Function::kSoftplus) return pick(first * a > second, a, scalar::softplus(first * a) / first);
  if constexpr (F == Function::kClamp) return scalar::at_most(scalar::at_least(a, first), second);
  if constexpr (F == Function::kScale) return a * first + second;
  if constexpr (F == Function::kAdd) return a + b;
  if constexpr (F == Function::kSub) return a - b;
  if constexpr (F == Function::kMul) return a * b;
  if constexpr (F == Function::kDiv) return a / b;
  if constexpr (F == Function::kMaximum) return pick((a != a) | (a > b), a, b);
  if constexpr (F == Function::kMinimum) return pick((a != a) | (a < b), a, b);
  if constexpr (F == Function::kFill) return pick(a != T(0), first, b);  // a is the mask
}

// apply for a function that is known at run time.
template <class T>
PYGEN_INLINE T apply_any(Function function, T a, T b, T first, T second) {
  switch (function) {
    case Function::kNeg:
      return apply<Function::kNeg>(a, b, first, second);
    case Function::kExp:
      return apply<Function::kExp>(a, b, first, second);
    case Function::kLog:
      return apply<Function::kLog>(a, b, first, second);
    case Function::kTanh:
      return apply<Function::kTanh>(a, b, first, second);
    case Function::kSigmoid:
      return apply<Function::kSigmoid>(a, b, first, second);
    case Function::kRelu:
      return apply<Function::kRelu>(a, b, first, second);
    case Function::kAbs:
      return apply<Function::kAbs>(a, b, first, second);
    case Function::kSqrt:
      return apply<Function::kSqrt>(a, b, first, second);
    case Function::kRsqrt:
      return apply<Function::kRsqrt>(a, b, first, second);
    case Function::kSilu:
      return apply<Function::kSilu>(a, b, first, second);
    case Function::kGelu:
      return apply<Function::kGelu>(a, b, first, second);
    case Function::kGeluTanh:
      return apply<Function::kGeluTanh>(a, b, first, second);
    case Function::kElu:
      return apply<Function::kElu>(a, b, first, second);
    case Function::kLeakyRelu:
      return apply<Function::kLeakyRelu>(a, b, first, second);
    case Function::kSoftplus:
      return apply<Function::kSoftplus>(a, b, first, second);
    case Function::kClamp:
      return apply<Function::kClamp>(a, b, first, second);
    case Function::kScale:
      return apply<Function::kScale>(a, b, first, second);
    case Function::kAdd:
      return apply<Function::kAdd>(a, b, first, second);
    case Function::kSub:
      return apply<Function::kSub>(a, b, first, second);
    case Function::kMul:
      return apply<Function::kMul>(a, b, first, second);
    case Function::kDiv:
      return apply<Function::kDiv>(a, b, first, second);
    case Function::kMaximum:
      return apply<Function::kMaximum>(a, b, first, second);
    case Function::kMinimum:
      return apply<Function::kMinimum>(a, b, first, second);
    case Function::kFill:
      return apply<Function::kFill>(a, b, first, second);
  }
  return a;
}

}  // namespace pygen::incremental
