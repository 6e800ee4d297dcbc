// What the host checks of the incremental programs before anything runs: every address that a program can form lies in
// its space, and every tensor has the size that the program says.
#pragma once

#include <array>
#include <limits>
#include <mutex>

#include "incremental.h"
#include "logistics.h"
#include "sampling_checks.h"
#include "tensor.h"

namespace pygen {

enum class Advance : int64_t { kFollow, kScore, kDraw };

struct AdvanceInputs {
  Tensor state;           // (n, numbers)
  Tensor tokens;          // int64 (n, steps)
  const Tensor& weights;  // packed
  const Tensor& program;  // int32, on the host
  const Tensor& device_program;
  const Tensor& conditions;            // (n, numbers)
  const Tensor& values;                // (levels,): what a token is as an element of the sample
  const std::optional<Tensor>& known;  // bool (n, steps): tokens that are given
  const Tensor& sample_ids;            // int64 (n,)
  PerRow seeds;
  int64_t begin, end;  // steps
  Advance mode;
  int64_t logistics;  // levels of a mixture of logistics, 0 for logits
  sampling::Filters filters;
};

class IncrementalChecker {
 public:
  explicit IncrementalChecker(const AdvanceInputs& inputs) : inputs_(inputs) {}

  incremental::Program checked() {
    const Tensor& code = inputs_.program;
    check(!code.is_cuda() && code.scalar_type() == ScalarType::Int && code.dim() == 1 && code.is_contiguous() &&
              code.numel() >= incremental::kHeader,
          "program has shape ", shape_of(code), ", but expected int32 (length,), contiguous, on the host");
    check(inputs_.device_program.scalar_type() == ScalarType::Int && inputs_.device_program.is_contiguous() &&
              inputs_.device_program.numel() == code.numel() && same_device(inputs_.device_program, inputs_.state),
          "device_program has shape ", shape_of(inputs_.device_program),
          ", but expected a copy of program where state is");
    const auto* data = static_cast<const int32_t*>(code.data_ptr());
    incremental::Header header;
    std::copy_n(data, incremental::kHeader, reinterpret_cast<int32_t*>(&header));
    const int32_t* const counts = reinterpret_cast<const int32_t*>(&header);
    check(std::all_of(counts, counts + incremental::kHeader, [](int32_t n) { return n >= 0; }) && header.channels > 0 &&
              header.height > 0 && header.width > 0 && header.vocabulary > 0 &&
              incremental::length_of(header) == code.numel() &&
              int64_t{header.steps} == int64_t{header.channels} * header.height * header.width,
          "program has ", code.numel(), " numbers, but its header says otherwise");
    program_ = incremental::program_at(data, header);
    check_tensors();
    if (!known_program(data, header)) {
      check_program();
      remember_program(data, header);
    }
    return program_;
  }

 private:
  // The programs that were checked last: a program is long, and a step short. One that was changed in place, or another
  // at its address, has another checksum.
  struct Seen {
    const int32_t* code = nullptr;
    int64_t length = 0;
    int32_t checksum = 0;
    bool operator==(const Seen&) const = default;
  };
  struct Memory {
    std::mutex mutex;
    std::array<Seen, 16> seen;
    size_t next = 0;
  };
  static Memory& memory() {
    static Memory instance;
    return instance;
  }
  static Seen seen_of(const int32_t* code, const incremental::Header& header) {
    return {code, incremental::length_of(header), header.checksum};
  }
  static bool known_program(const int32_t* code, const incremental::Header& header) {
    Memory& all = memory();
    const std::lock_guard lock(all.mutex);
    return std::find(all.seen.begin(), all.seen.end(), seen_of(code, header)) != all.seen.end();
  }
  static void remember_program(const int32_t* code, const incremental::Header& header) {
    Memory& all = memory();
    const std::lock_guard lock(all.mutex);
    all.seen[all.next++ % all.seen.size()] = seen_of(code, header);
  }

  void check_tensors() const {
    const incremental::Header& header = program_.header;
    const Tensor& state = inputs_.state;
    const ScalarType dtype = state.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double,
          "state has a dtype that is not supported: expected float32 or float64");
    const int64_t n = state.dim() > 0 ? state.size(0) : 0;
    check_matrix("state", state, dtype, n, header.state);
    check_matrix("conditions", inputs_.conditions, dtype, n, header.conditions);
    check_matrix("tokens", inputs_.tokens, ScalarType::Long, n, header.steps);
    if (inputs_.known) check_matrix("known", *inputs_.known, ScalarType::Bool, n, header.steps);
    check(inputs_.weights.scalar_type() == dtype && inputs_.weights.dim() == 1 && inputs_.weights.is_contiguous() &&
              inputs_.weights.numel() == header.weights && same_device(inputs_.weights, state),
          "weights has shape ", shape_of(inputs_.weights), ", but expected (", header.weights,
          ",), contiguous, with the dtype and device of state");
    check(inputs_.values.scalar_type() == dtype && inputs_.values.dim() == 1 && inputs_.values.is_contiguous() &&
              inputs_.values.numel() > 0 && same_device(inputs_.values, state),
          "values has shape ", shape_of(inputs_.values),
          ", but expected (levels,), contiguous, with the dtype and device of state");
    check_sample_ids(inputs_.sample_ids, state);
    check(inputs_.begin >= 0 && inputs_.begin <= inputs_.end && inputs_.end <= header.steps, "the steps from ",
          inputs_.begin, " to ", inputs_.end, " were asked for, but the program has ", header.steps);
    const int64_t of_colours = header.channels == 3 ? 10 : 3;
    check(inputs_.logistics == 0 ||
              ((header.channels == 1 || header.channels == 3) && header.vocabulary % of_colours == 0 &&
               inputs_.logistics >= 2 && header.vocabulary / of_colours <= logistics::kMaxMixtures),
          "a program with ", header.channels, " channels and ", header.vocabulary,
          " outputs is no discretized mixture of logistics");
  }

  void check_matrix(const char* name, const Tensor& tensor, ScalarType dtype, int64_t rows, int64_t columns) const {
    check(tensor.scalar_type() == dtype && tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
              tensor.is_contiguous() && same_device(tensor, inputs_.state),
          name, " has shape ", shape_of(tensor), ", but expected (", rows, ", ", columns,
          "), contiguous, with the device and dtype that the program works on");
  }

  void check_program() {
    const incremental::Header& header = program_.header;
    for (int32_t i = 0; i < header.operations; ++i) {
      check(holds(program_.operations[i]), "program names what is not there in operation ", i);
    }
    check(program_.templates[0] == 0 && program_.templates[header.templates] == header.tasks,
          "program has templates that do not cover its tasks");
    for (int32_t i = 0; i < header.templates; ++i) {
      check(program_.templates[i] <= program_.templates[i + 1], "program has a template that ends before it begins");
    }
    for (int32_t step = 0; step < header.steps; ++step) {
      const int32_t index = program_.steps[step];
      check(index >= 0 && index < header.templates, "program has no template for step ", step);
    }
    const incremental::Shape sample{header.height, header.width};
    for (int32_t c = 0; c < header.channels; ++c) {
      const int32_t write = program_.writes[c];
      check(source_holds(program_.draws[c], sample, header.vocabulary) &&
                (write == -1 || (source_holds(write, sample, 1) && is_target(program_.sources[write]))),
            "program draws from, or writes to, what is not there");
    }
    check_tasks();
  }

  // Steps share templates, so the rows and columns that one adds are bounded for all of its steps.
  void check_tasks() const {
    const incremental::Header& header = program_.header;
    for (int32_t step = 0; step < header.steps; ++step) {
      const int32_t index = program_.steps[step];
      for (int32_t t = program_.templates[index]; t < program_.templates[index + 1]; ++t) {
        const incremental::Task& task = program_.tasks[t];
        check(task.operation >= 0 && task.operation < header.operations, "program has a task without an operation");
        const incremental::Shape& grid = program_.grids[program_.operations[task.operation].grid];
        const int64_t y = row_at(header, grid, step) + task.row, x = column_at(header, grid, step) + task.column;
        check(y >= 0 && y < grid.height && x >= 0 && task.count > 0 && x + task.count <= grid.width,
              "program has a task outside of its grid at step ", step);
      }
    }
  }

  static bool is_target(const incremental::Source& source) {
    return source.space == incremental::Space::kState && source.gather == incremental::kNoTable;
  }

  bool table(int64_t first, int64_t count) const {
    return first >= 0 && count >= 0 && first + count <= program_.header.tables;
  }

  // Whether `count` channels are there at each site of a grid, read or written as whole vectors.
  bool source_holds(int64_t index, const incremental::Shape& grid, int64_t count) const {
    if (index < 0 || index >= program_.header.sources) return false;
    const incremental::Source& source = program_.sources[index];
    const int64_t spaces[] = {program_.header.state, program_.header.weights, program_.header.conditions};
    const auto space = static_cast<int32_t>(source.space);
    if (space < 0 || space >= incremental::kSpaces || source.count != count || source.offset < 0) return false;
    if (!table(source.rows, grid.height) || !table(source.columns, grid.width)) return false;
    int64_t last = 0;
    for (const auto& [first, length] : {std::pair{source.rows, grid.height}, std::pair{source.columns, grid.width}}) {
      const int32_t* const offsets = program_.tables + first;
      for (int32_t i = 0; i < length; ++i) {
        if (offsets[i] != incremental::kNowhere && offsets[i] < 0) return false;
      }
      last += std::max(0, *std::max_element(offsets, offsets + length));
    }
    if (source.gather == incremental::kNoTable) {
      return last + source.offset + incremental::padded(count) <= spaces[space];
    }
    if (!table(source.gather, count)) return false;
    const int32_t* const channels = program_.tables + source.gather;
    const auto [low, high] = std::minmax_element(channels, channels + count);
    return count > 0 && *low >= 0 && last + source.offset + *high < spaces[space];
  }

  bool weights(int64_t first, int64_t count) const {
    return first >= 0 && count >= 0 && first <= program_.header.weights - count;
  }

  bool holds(const incremental::Operation& in) const {
    using incremental::Kind;
    const incremental::Header& header = program_.header;
    if (in.grid < 0 || in.grid >= header.grids || in.channels <= 0 || in.channels > header.widest) return false;
    const incremental::Shape& grid = program_.grids[in.grid];
    if (grid.height <= 0 || grid.width <= 0 || !source_holds(in.out, grid, in.channels)) return false;
    if (!is_target(program_.sources[in.out])) return false;
    if (in.first_source < 0 || in.sources < 0 || in.first_source > header.sources - in.sources) return false;
    const incremental::Source* const sources = program_.sources + in.first_source;
    const int64_t width = incremental::padded(in.channels);
    switch (in.kind) {
      case Kind::kLinear: {
        int64_t inputs = 0;
        for (int32_t s = 0; s < in.sources; ++s) {
          if (sources[s].gather != incremental::kNoTable || !source_holds(in.first_source + s, grid, sources[s].count))
            return false;
          inputs += sources[s].count;
        }
        return inputs < (int64_t{1} << 31) && weights(in.weights, (inputs + 1) * width);
      }
      case Kind::kPointwise:
        return in.sources > 0 && each_source(in, grid, in.channels) && instructions_hold(in);
      case Kind::kNorm: {
        int64_t channels = 0;
        for (int32_t s = 0; s < in.sources; ++s) {
          if (!source_holds(in.first_source + s, grid, sources[s].count)) return false;
          channels += sources[s].count;
        }
        return channels == in.channels && weights(in.weights, 2 * width + 1);
      }
      case Kind::kLookup:
        return in.sources == 1 && in.heads > 0 && source_holds(in.first_source, grid, 1) &&
               weights(in.weights, in.heads * width);
      case Kind::kAttention:
        return attention_holds(in, grid, sources);
    }
    return false;
  }

  bool each_source(const incremental::Operation& in, const incremental::Shape& grid, int64_t channels) const {
    for (int32_t s = 0; s < in.sources; ++s) {
      if (!source_holds(in.first_source + s, grid, channels)) return false;
    }
    return true;
  }

  bool instructions_hold(const incremental::Operation& in) const {
    if (in.instructions <= 0 || in.instructions + in.sources > incremental::kMostRegisters ||
        in.first_instruction < 0 || in.first_instruction > program_.header.instructions - in.instructions) {
      return false;
    }
    for (int32_t i = 0; i < in.instructions; ++i) {
      const incremental::Instruction& each = program_.instructions[in.first_instruction + i];
      const int32_t registers = in.sources + i, function = static_cast<int32_t>(each.function);
      if (function < 0 || function >= incremental::kFunctions || each.a < 0 || each.a >= registers || each.b < 0 ||
          each.b >= registers || !weights(each.numbers, 2)) {
        return false;
      }
    }
    return true;
  }

  bool attention_holds(const incremental::Operation& in, const incremental::Shape& grid,
                       const incremental::Source* sources) const {
    if (in.sources != 3 || in.heads <= 0 || in.channels % in.heads != 0 || sources[0].count % in.heads != 0 ||
        sources[0].count > program_.header.widest || !weights(in.weights, 1)) {
      return false;
    }
    const int64_t queries = int64_t{grid.height} * grid.width, keys = int64_t{sources[1].height} * sources[1].width;
    if (sources[1].height <= 0 || sources[1].width <= 0 || sources[1].height != sources[2].height ||
        sources[1].width != sources[2].width || !table(in.first_key, queries) || !table(in.last_key, queries)) {
      return false;
    }
    const incremental::Shape shape{sources[1].height, sources[1].width};
    if (!source_holds(in.first_source, grid, sources[0].count) ||
        !source_holds(in.first_source + 1, shape, sources[0].count) ||
        !source_holds(in.first_source + 2, shape, in.channels) || sources[1].gather != incremental::kNoTable ||
        sources[2].gather != incremental::kNoTable || sources[0].gather != incremental::kNoTable) {
      return false;
    }
    for (int64_t i = 0; i < queries; ++i) {
      const int32_t first = program_.tables[in.first_key + i], last = program_.tables[in.last_key + i];
      if (first < 0 || last < first || last > keys) return false;
    }
    return true;
  }

  const AdvanceInputs& inputs_;
  incremental::Program program_{};
};

// The operator up to the steps themselves, which are the backend's: Backend::advance<T>(program, inputs, log_prob,
// logits). logits is nullptr where nobody asked.
template <class Backend>
std::tuple<Tensor, Tensor> incremental_advance(Tensor state, Tensor tokens, Tensor weights, Tensor program,
                                               Tensor device_program, int64_t vocabulary, Tensor conditions,
                                               Tensor values, std::optional<Tensor> known, Tensor sample_ids,
                                               int64_t seed, std::optional<Tensor> seeds, int64_t begin, int64_t end,
                                               int64_t mode, int64_t logistics, double temperature, int64_t top_k,
                                               double top_p, double min_p, double typical_p, bool split_ties,
                                               bool with_logits) {
  check(mode >= 0 && mode <= 2, "mode is ", mode, ", but expected 0 to 2");
  const AdvanceInputs inputs{state,
                             tokens,
                             weights,
                             program,
                             device_program,
                             conditions,
                             values,
                             known,
                             sample_ids,
                             per_row("seed", seeds, seed, state),
                             begin,
                             end,
                             static_cast<Advance>(mode),
                             logistics,
                             {1, 1, temperature, top_k, top_p, min_p, typical_p, split_ties}};
  const incremental::Program checked = IncrementalChecker(inputs).checked();
  check_filters(state, {}, {}, {}, inputs.filters);
  check(vocabulary == checked.header.vocabulary, "vocabulary is ", vocabulary, ", but the program has ",
        checked.header.vocabulary, " outputs");
  const int64_t n = state.size(0);
  Tensor log_prob = torch::stable::new_empty(state, {n, end - begin});
  if (inputs.mode == Advance::kFollow) torch::stable::zero_(log_prob);
  Tensor logits = torch::stable::new_empty(state, {n, with_logits ? end - begin : 0, checked.header.vocabulary});
  auto run = [&](auto type) {
    Backend::template advance<decltype(type)>(checked, inputs, log_prob, with_logits ? &logits : nullptr);
  };
  if (n > 0 && begin < end) state.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {log_prob, logits};
}

}  // namespace pygen
