// What the host checks for the masked sweeps before a loop or a launch: every row, weight, constant and column that a
// program names must be there.
#pragma once

#include "masked.h"
#include "tensor.h"

namespace pygen {

// The tensors that a program reads beside itself.
struct SweepInputs {
  const Tensor& samples;    // (n, columns)
  const Tensor& weights;    // packed
  const Tensor* constants;  // nullptr where the program uses none
  const Tensor& program;    // on the host
  const Tensor& device_program;
};

inline bool within(int64_t first, int64_t count, int64_t size) {
  return first >= 0 && count >= 0 && first <= size && count <= size - first;
}

class ProgramChecker {
 public:
  ProgramChecker(const SweepInputs& inputs, int64_t outputs, int64_t per_input)
      : outputs_(outputs), per_input_(per_input) {
    const Tensor& samples = inputs.samples;
    const ScalarType dtype = samples.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double,
          "samples has a dtype that is not supported: expected float32 or float64");
    check(samples.dim() == 2 && samples.is_contiguous(), "samples has shape ", shape_of(samples),
          ", but expected (n, columns), contiguous");
    check_flat("weights", inputs.weights, dtype, samples);
    if (inputs.constants) check_flat("constants", *inputs.constants, dtype, samples);
    check(!inputs.program.is_cuda(), "program is not on the host");
    check(inputs.program.scalar_type() == ScalarType::Long && inputs.program.dim() == 1 &&
              inputs.program.is_contiguous() && inputs.program.numel() >= masked::kHeader,
          "program has shape ", shape_of(inputs.program), ", but expected int64 (length,), contiguous");
    check(same_device(inputs.device_program, samples) && inputs.device_program.scalar_type() == ScalarType::Long &&
              inputs.device_program.is_contiguous() && inputs.device_program.numel() == inputs.program.numel(),
          "device_program has shape ", shape_of(inputs.device_program),
          ", but expected a copy of program where samples "
          "are");
    columns_ = samples.size(1);
    weights_ = inputs.weights.numel();
    constants_ = inputs.constants ? inputs.constants->numel() : 0;
    const int64_t* code = static_cast<const int64_t*>(inputs.program.data_ptr());
    const int64_t room = inputs.program.numel() - masked::kHeader;
    check(within(0, code[0], room / 3) && within(0, code[1], room / 8) && within(0, code[2], room) &&
              3 * code[0] + 8 * code[1] + code[2] == room,
          "program has ", room, " numbers after its header, but its counts say otherwise");
    program_ = masked::read_program(code);
    check(program_.outputs == outputs, "program has ", program_.outputs, " outputs, but expected ", outputs);
    check(program_.rows >= 0 && program_.rows < int64_t{1} << 31, "program has ", program_.rows,
          " rows, but expected fewer than 2^31");
  }

  masked::Program checked() const {
    for (int64_t s = 0; s < program_.stage_count; ++s) {
      const masked::Stage& stage = program_.stages[s];
      check(stage.begin >= 0 && stage.begin <= stage.sequential && stage.sequential <= stage.end &&
                stage.end <= program_.instruction_count,
            "program names instructions outside of it in stage ", s);
      for (int64_t i = stage.begin; i < stage.sequential; ++i) {
        check(program_.instructions[i].kind == masked::Kind::kLinear,
              "program has other than products side by side in stage ", s);
      }
    }
    for (int64_t i = 0; i < program_.instruction_count; ++i) {
      check(holds(program_.instructions[i]),
            "program names a row, weight, constant or column that is not there in instruction ", i);
    }
    return program_;
  }

 private:
  static void check_flat(const char* name, const Tensor& tensor, ScalarType dtype, const Tensor& samples) {
    check(tensor.scalar_type() == dtype && tensor.dim() == 1 && tensor.is_contiguous() && same_device(tensor, samples),
          name, " has shape ", shape_of(tensor),
          ", but expected (length,), contiguous, with the dtype and device of "
          "samples");
  }

  bool rows(int64_t first, int64_t count) const { return within(first, count, program_.rows); }

  // A row, or ~column of the samples.
  bool value(int64_t operand) const { return operand >= 0 ? rows(operand, 1) : within(~operand, 1, columns_); }

  template <class F>
  bool operands(int64_t first, int64_t count, const F& f) const {
    if (!within(first, count, program_.operand_count)) return false;
    for (int64_t i = 0; i < count; ++i) {
      if (!f(i, program_.operands[first + i])) return false;
    }
    return true;
  }

  bool holds(const masked::Instruction& in) const {
    using masked::Kind;
    const auto any_value = [&](int64_t, int64_t operand) { return value(operand); };
    if (in.kind != Kind::kStore && !rows(in.row, in.rows)) return false;
    switch (in.kind) {
      case Kind::kLinear:
        return rows(in.a, in.b) && (in.rows == 0 || in.b <= weights_ / in.rows) &&
               within(in.c, in.rows * in.b, weights_) &&
               (in.d < 0 ? in.d >= masked::kZero : within(in.d, in.rows, constants_));
      case Kind::kActivation:
        return in.b >= 0 && in.b < masked::kUnits && within(in.c, 1, constants_) && operands(in.a, in.rows, any_value);
      case Kind::kAdd:
      case Kind::kMultiply:
        return operands(in.a, 2 * in.rows, any_value);
      case Kind::kScale:
        return within(in.c, 2 * in.rows, constants_) && operands(in.a, in.rows, any_value);
      case Kind::kTransform:
        return in.c == per_input_ && in.c > 0 && rows(in.b, in.rows * in.c) && outputs_ <= columns_ &&
               operands(in.a, in.rows, [&](int64_t, int64_t column) { return within(column, 1, outputs_); });
      case Kind::kAccumulate:
        return operands(in.a, 2 * in.rows, [&](int64_t i, int64_t operand) {
          return i % 2 == 0 ? rows(operand, 1) : operand == -1 || within(operand, 1, columns_);
        });
      case Kind::kSolve:
        return per_input_ == 0 && in.c > 0 && in.c < program_.rows && rows(in.b, in.rows * in.c) && in.d >= 0 &&
               in.d <= columns_ / (1 + 2 * in.c) &&
               operands(in.a, in.rows, [&](int64_t, int64_t column) { return within(column, 1, in.d); });
      case Kind::kStore:
        return operands(in.a, 2 * in.rows, [&](int64_t i, int64_t operand) {
          return i % 2 == 0 ? rows(operand, 1) : within(operand, 1, outputs_);
        });
    }
    return false;
  }

  int64_t outputs_, per_input_;
  int64_t columns_ = 0, weights_ = 0, constants_ = 0;
  masked::Program program_;
};

// per_input: the parameters of an input where the program may transform, 0 where it may solve.
inline masked::Program checked_program(const SweepInputs& inputs, int64_t outputs, int64_t per_input) {
  return ProgramChecker(inputs, outputs, per_input).checked();
}

}  // namespace pygen
