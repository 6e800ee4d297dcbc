// A masked network as a program on rows of units, for the inverse of an autoregressive transform and its gradient.
//
//   x_i = tau^{-1}(y_i; p_i),  p_i a function of the inputs before i  (Papamakarios et al. 2017, MAF, eq. 3-4)
//
// A row holds one unit for a tile of samples. pygen/ops/masked_program.py writes the instructions so that each row is
// computed once, when all that it reads is there; here is what one instruction does to one element.
#pragma once

#include "scalar.h"

namespace pygen::masked {

// In the order of the kinds in pygen/ops/masked_program.py, with the meaning of an instruction's fields.
enum class Kind : int64_t {
  // rows += weights (rows, count) sources, from source row a, count b, first weight c, start d
  kLinear,
  kActivation,  // row = activation(operand), operands a, Unit b, parameter at constant c
  kAdd,         // row = operand + operand, operands a
  kMultiply,    // row = operand * operand, operands a
  kScale,       // row = operand * scale + shift, operands a, pairs of constants from c
  kTransform,   // x_row = tau^{-1}(y; parameters), columns of y from operand a, first parameter's row b, count c
  kAccumulate,  // row += operand row * slope, operands a: the row, and the slope's column or -1 for 1
  // row += c; parameter rows = a row + b: columns of c from operand a, first parameter's row b, count c
  kSolve,
  kStore  // out[column] = row, operands a: pairs of row and column
};
constexpr int64_t kKinds = 9;

// What a linear instruction adds to, if not to constants from that number on.
constexpr int64_t kContinue = -1, kZero = -2;

// Rows whose weights lie together, for each source in turn: PANEL of pygen/ops/masked_program.py. Six rows of two
// vectors fill the registers of AVX-512 enough to hide its latency; six of one those of AVX2.
constexpr int kPanel = 6;

struct Instruction {
  Kind kind;
  int64_t row, rows, a, b, c, d, unused;
};

struct Stage {
  int64_t begin, sequential, end;  // up to `sequential` no instruction depends on another of the stage
};

struct Program {
  int64_t stage_count, instruction_count, operand_count, rows, outputs;
  const Stage* stages;
  const Instruction* instructions;
  const int64_t* operands;
};

constexpr int64_t kHeader = 5;

// The program whose counts are those of `program`, in a copy of its code at another address.
inline Program at_address(const int64_t* code, Program program) {
  program.stages = reinterpret_cast<const Stage*>(code + kHeader);
  program.instructions = reinterpret_cast<const Instruction*>(program.stages + program.stage_count);
  program.operands = reinterpret_cast<const int64_t*>(program.instructions + program.instruction_count);
  return program;
}

inline Program read_program(const int64_t* code) {
  return at_address(code, {code[0], code[1], code[2], code[3], code[4], nullptr, nullptr, nullptr});
}

// In the order of ACTIVATIONS in pygen/ops/masked_units.py.
enum class Unit : int64_t { kRelu, kLeakyRelu, kElu, kTanh, kSigmoid, kSilu, kGelu, kGeluTanh, kSoftplus };
constexpr int64_t kUnits = 9;

template <Unit U, class T>
PYGEN_INLINE T activate(T h, T parameter) {
  if constexpr (U == Unit::kRelu) return scalar::at_least(h, T(0));
  if constexpr (U == Unit::kLeakyRelu) return h > T(0) ? h : parameter * h;
  if constexpr (U == Unit::kElu) {
    // e^h - 1 = 2 t / (1 - t) with t = tanh(h / 2), which keeps its digits near zero.
    const T t = scalar::tanh(T(0.5) * scalar::at_most(h, T(0)));
    return h > T(0) ? h : parameter * (T(2) * t / (T(1) - t));
  }
  if constexpr (U == Unit::kTanh) return scalar::tanh(h);
  if constexpr (U == Unit::kSigmoid) return scalar::sigmoid(h);
  if constexpr (U == Unit::kSilu) return h * scalar::sigmoid(h);
  if constexpr (U == Unit::kGelu) return T(0.5) * h * (T(1) + std::erf(h * T(0.70710678118654752440)));
  if constexpr (U == Unit::kGeluTanh) {
    return T(0.5) * h * (T(1) + scalar::tanh(T(0.79788456080286535588) * (h + T(0.044715) * h * h * h)));
  }
  if constexpr (U == Unit::kSoftplus) return scalar::softplus(parameter * h) / parameter;
}

template <Unit U>
struct UnitTag {
  static constexpr Unit value = U;
};

// Calls `f(Tag{})` with the activation as a constant, Tag::value.
template <class F>
PYGEN_INLINE void for_unit(int64_t unit, F&& f) {
  switch (static_cast<Unit>(unit)) {
    case Unit::kRelu:
      return f(UnitTag<Unit::kRelu>{});
    case Unit::kLeakyRelu:
      return f(UnitTag<Unit::kLeakyRelu>{});
    case Unit::kElu:
      return f(UnitTag<Unit::kElu>{});
    case Unit::kTanh:
      return f(UnitTag<Unit::kTanh>{});
    case Unit::kSigmoid:
      return f(UnitTag<Unit::kSigmoid>{});
    case Unit::kSilu:
      return f(UnitTag<Unit::kSilu>{});
    case Unit::kGelu:
      return f(UnitTag<Unit::kGelu>{});
    case Unit::kGeluTanh:
      return f(UnitTag<Unit::kGeluTanh>{});
    case Unit::kSoftplus:
      return f(UnitTag<Unit::kSoftplus>{});
  }
}

}  // namespace pygen::masked
