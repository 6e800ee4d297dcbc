// The incremental programs on the CPU: each thread takes blocks of samples through all steps, so that threads never
// wait, the weights that a task reads serve all samples of a block, and a sample's numbers stay in the caches.
#include "incremental.h"

#include <memory>
#include <numeric>
#include <vector>

#include "incremental_checks.h"
#include "incremental_draw.h"
#include "incremental_rows.h"
#include "tensor.h"

namespace pygen {
namespace {

using incremental::Function;
using incremental::Header;
using incremental::Instruction;
using incremental::kMostColumns;
using incremental::kMostVectors;
using incremental::kPanel;
using incremental::kVectorSize;
using incremental::Operation;
using incremental::padded;
using incremental::Piece;
using incremental::Program;
using incremental::Source;
using incremental::Space;

constexpr int64_t kMostSamples = 8;  // of a block

// What the steps of a call share.
template <class T>
struct Advancing {
  const Program& program;
  const AdvanceInputs& inputs;
  int64_t n;
  T* state;
  int64_t* tokens;
  const T* weights;
  const T* conditions;
  const T* values;
  int64_t levels;
  const bool* known;  // or nullptr
  const int64_t* sample_ids;
  int64_t id_stride;
  T* log_prob;
  T* logits;  // or nullptr

  Advancing(const Program& checked, const AdvanceInputs& given, Tensor& log_probs, Tensor* all_logits)
      : program(checked),
        inputs(given),
        n(given.state.size(0)),
        state(static_cast<T*>(given.state.data_ptr())),
        tokens(static_cast<int64_t*>(given.tokens.data_ptr())),
        weights(static_cast<const T*>(given.weights.data_ptr())),
        conditions(static_cast<const T*>(given.conditions.data_ptr())),
        values(static_cast<const T*>(given.values.data_ptr())),
        levels(given.values.size(0)),
        known(given.known ? static_cast<const bool*>(given.known->data_ptr()) : nullptr),
        sample_ids(static_cast<const int64_t*>(given.sample_ids.data_ptr())),
        id_stride(given.sample_ids.stride(0)),
        log_prob(static_cast<T*>(log_probs.data_ptr())),
        logits(all_logits ? static_cast<T*>(all_logits->data_ptr()) : nullptr) {}
};

// One thread's way through its blocks.
template <class T>
class Walker {
 public:
  explicit Walker(const Advancing<T>& all)
      : all_(all),
        program_(all.program),
        header_(all.program.header),
        drawer_(incremental::make_drawer<T>(header_.vocabulary, header_.channels, all.inputs.logistics,
                                            all.inputs.filters)) {
    int64_t most_registers = 1, most_sources = 1, most_keys = 0, most_sites = 1;
    for (int32_t i = 0; i < header_.operations; ++i) {
      const Operation& in = program_.operations[i];
      most_registers = std::max<int64_t>(most_registers, in.sources + in.instructions);
      most_sources = std::max<int64_t>(most_sources, in.sources);
      most_sites = std::max<int64_t>(most_sites, program_.grids[in.grid].width);
      if (in.kind == incremental::Kind::kAttention) {
        const Source& key = program_.sources[in.first_source + 1];
        most_keys = std::max(most_keys, int64_t{key.height} * key.width);
      }
    }
    zeros_.assign(static_cast<size_t>(header_.widest), T(0));
    registers_.resize(static_cast<size_t>(most_registers * header_.widest));
    pointers_.resize(static_cast<size_t>(most_registers));
    addresses_.resize(static_cast<size_t>(most_sites * most_sources));
    pieces_.resize(static_cast<size_t>(most_sources));
    read_.resize(static_cast<size_t>(most_sources));
    inputs_.resize(static_cast<size_t>(most_sources * kMostColumns));
    sites_.resize(static_cast<size_t>(most_sites));
    scores_.resize(static_cast<size_t>(most_keys));
  }

  // Samples first .. first + count.
  void run(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    for (int64_t step = all_.inputs.begin; step < all_.inputs.end; ++step) {
      if (step > 0) write_element(step - 1);
      const int32_t index = program_.steps[step];
      for (int32_t t = program_.templates[index]; t < program_.templates[index + 1]; ++t) {
        const incremental::Task& task = program_.tasks[t];
        const Operation& in = program_.operations[task.operation];
        const incremental::Shape& grid = program_.grids[in.grid];
        execute(in, row_at(header_, grid, step) + task.row, column_at(header_, grid, step) + task.column, task.count);
      }
      draw_element(step);
    }
  }

 private:
  T* state(int64_t sample) const { return all_.state + (first_ + sample) * header_.state; }
  int64_t* tokens(int64_t sample) const { return all_.tokens + (first_ + sample) * header_.steps; }

  const T* space(Space space, int64_t sample) const {
    switch (space) {
      case Space::kState:
        return state(sample);
      case Space::kWeights:
        return all_.weights;
      default:
        return all_.conditions + (first_ + sample) * header_.conditions;
    }
  }

  // The channels of a source at an address, side by side; gathered channels are copied to `buffer`.
  const T* channels(const Source& source, int64_t address, int64_t sample, T* buffer) const {
    if (address < 0) return zeros_.data();
    const T* from = space(source.space, sample) + address;
    if (source.gather == incremental::kNoTable) return from;
    const int32_t* const index = program_.tables + source.gather;
    for (int32_t i = 0; i < source.count; ++i) buffer[i] = from[index[i]];
    return buffer;
  }

  T* target(const Operation& in, int64_t y, int64_t x, int64_t sample) const {
    return state(sample) + incremental::address(program_, program_.sources[in.out], y, x);
  }

  void execute(const Operation& in, int64_t y, int64_t x, int64_t sites) {
    switch (in.kind) {
      case incremental::Kind::kLinear:
        return linear(in, y, x, sites);
      case incremental::Kind::kPointwise:
        for (int64_t i = 0; i < sites; ++i) pointwise(in, y, x + i);
        return;
      case incremental::Kind::kNorm:
        for (int64_t i = 0; i < sites; ++i) normalize(in, y, x + i);
        return;
      case incremental::Kind::kLookup:
        for (int64_t i = 0; i < sites; ++i) look_up(in, y, x + i);
        return;
      case incremental::Kind::kAttention:
        for (int64_t i = 0; i < sites; ++i) attend(in, y, x + i);
        return;
    }
  }

  // Sites that read the same sources go together; what a site reads as zeros is left out, so that a strided or
  // transposed convolution costs what it needs.
  void linear(const Operation& in, int64_t y, int64_t x, int64_t sites) {
    const Source* const sources = program_.sources + in.first_source;
    for (int64_t i = 0; i < sites; ++i) {
      for (int32_t s = 0; s < in.sources; ++s) {
        addresses_[static_cast<size_t>(i * in.sources + s)] = incremental::address(program_, sources[s], y, x + i);
      }
    }
    std::iota(sites_.begin(), sites_.begin() + sites, x);
    for (int64_t left = sites; left > 0;) {
      const int64_t* const first = addresses_.data() + (sites_[0] - x) * in.sources;
      const auto alike = [&](int64_t site) {
        const int64_t* const own = addresses_.data() + (site - x) * in.sources;
        return std::equal(own, own + in.sources, first, [](int64_t a, int64_t b) { return (a < 0) == (b < 0); });
      };
      const auto middle = std::stable_partition(sites_.begin(), sites_.begin() + left, alike);
      multiply(in, y, x, middle - sites_.begin());
      std::copy(middle, sites_.begin() + left, sites_.begin());
      left -= middle - sites_.begin();
    }
  }

  // The first `sites` of sites_, which read the same sources.
  void multiply(const Operation& in, int64_t y, int64_t x, int64_t sites) {
    const Source* const sources = program_.sources + in.first_source;
    const int64_t* const first = addresses_.data() + (sites_[0] - x) * in.sources;
    int64_t pieces = 0, row = 0;
    for (int32_t s = 0; s < in.sources; ++s) {
      if (first[s] >= 0) {
        pieces_[static_cast<size_t>(pieces)] = {row, sources[s].count};
        read_[static_cast<size_t>(pieces++)] = s;
      }
      row += sources[s].count;
    }
    const int64_t columns = sites * count_, tiles = (columns + kMostColumns - 1) / kMostColumns;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t from = columns * tile / tiles, width = columns * (tile + 1) / tiles - from;
      T* outs[kMostColumns];
      for (int64_t c = 0; c < width; ++c) {
        const int64_t site = sites_[static_cast<size_t>((from + c) / count_)], sample = (from + c) % count_;
        outs[c] = target(in, y, site, sample);
        const int64_t* const own = addresses_.data() + (site - x) * in.sources;
        for (int64_t p = 0; p < pieces; ++p) {
          const int32_t s = read_[static_cast<size_t>(p)];
          inputs_[static_cast<size_t>(p * kMostColumns + c)] = space(sources[s].space, sample) + own[s];
        }
      }
      multiply_panels(in, row, pieces, width, outs);
    }
  }

  void multiply_panels(const Operation& in, int64_t inputs, int64_t pieces, int64_t columns, T* const* outs) const {
    const int64_t outputs = padded(in.channels);
    const T* const bias = all_.weights + in.weights;
    const T* panel = bias + outputs;
    static const bool wide = incremental::wide_registers();
    T* to[kMostColumns];
    for (int64_t o = 0; o < outputs; o += kPanel) {
      const int64_t width = std::min(kPanel, outputs - o);
      const int64_t most = (wide ? kMostVectors : 1) * kVectorSize<T>;
      for (int64_t v = 0; v < width; v += most) {
        const int64_t vectors = std::min(most, width - v) / kVectorSize<T>;
        for (int64_t c = 0; c < columns; ++c) to[c] = outs[c] + o + v;
        incremental::tile_for<T>(vectors, columns)(panel + v, width, pieces_.data(), pieces, inputs_.data(),
                                                   bias + o + v, to);
      }
      panel += inputs * width;
    }
  }

  void pointwise(const Operation& in, int64_t y, int64_t x) {
    const Source* const sources = program_.sources + in.first_source;
    const Instruction* const instructions = program_.instructions + in.first_instruction;
    const int64_t width = padded(in.channels);
    for (int32_t s = 0; s < in.sources; ++s) {
      addresses_[static_cast<size_t>(s)] = incremental::address(program_, sources[s], y, x);
    }
    for (int64_t sample = 0; sample < count_; ++sample) {
      for (int32_t s = 0; s < in.sources; ++s) {
        pointers_[static_cast<size_t>(s)] =
            channels(sources[s], addresses_[static_cast<size_t>(s)], sample, registers_.data() + s * header_.widest);
      }
      for (int32_t i = 0; i < in.instructions; ++i) {
        const Instruction& each = instructions[i];
        const bool last = i + 1 == in.instructions;
        T* const to = last ? target(in, y, x, sample) : registers_.data() + (in.sources + i) * header_.widest;
        incremental::row_for<T>(each.function)(pointers_[static_cast<size_t>(each.a)],
                                               pointers_[static_cast<size_t>(each.b)], all_.weights + each.numbers,
                                               width, to);
        pointers_[static_cast<size_t>(in.sources + i)] = to;
      }
    }
  }

  void normalize(const Operation& in, int64_t y, int64_t x) {
    const int64_t width = padded(in.channels);
    const T* const weight = all_.weights + in.weights;
    T* const all = registers_.data();
    for (int64_t sample = 0; sample < count_; ++sample) {
      int64_t at = 0;
      for (int32_t s = 0; s < in.sources; ++s) {
        const Source& source = program_.sources[in.first_source + s];
        const T* from = channels(source, incremental::address(program_, source, y, x), sample, all + at);
        if (from != all + at) std::copy_n(from, source.count, all + at);
        at += source.count;
      }
      const T mean = incremental::sum_row(all, in.channels) / static_cast<T>(in.channels);
      const T variance = incremental::centre_row(all, in.channels, mean) / static_cast<T>(in.channels);
      const T scale = T(1) / std::sqrt(variance + weight[2 * width]);
      incremental::normalize_row(all, scale, weight, weight + width, width, target(in, y, x, sample));
    }
  }

  void look_up(const Operation& in, int64_t y, int64_t x) {
    const Source& source = program_.sources[in.first_source];
    const int64_t width = padded(in.channels), address = incremental::address(program_, source, y, x);
    for (int64_t sample = 0; sample < count_; ++sample) {
      const T value = *channels(source, address, sample, registers_.data());
      const bool valid = value >= T(0) && value < static_cast<T>(in.heads);
      const T* const row = all_.weights + in.weights + (valid ? static_cast<int64_t>(value) : 0) * width;
      T* const to = target(in, y, x, sample);
      for (int64_t i = 0; i < width; ++i) to[i] = valid ? row[i] : std::numeric_limits<T>::quiet_NaN();
    }
  }

  void attend(const Operation& in, int64_t y, int64_t x) {
    const Source &query = program_.sources[in.first_source], &key = program_.sources[in.first_source + 1],
                 &value = program_.sources[in.first_source + 2];
    const int64_t site = y * program_.grids[in.grid].width + x;
    const int64_t first = program_.tables[in.first_key + site], last = program_.tables[in.last_key + site];
    const int64_t size = query.count / in.heads, width = in.channels / in.heads;
    const T scale = all_.weights[in.weights];
    const int64_t at = incremental::address(program_, query, y, x);
    for (int64_t sample = 0; sample < count_; ++sample) {
      const T* const q = channels(query, at, sample, registers_.data());
      const T *const keys = space(key.space, sample), *const values = space(value.space, sample);
      T* const to = target(in, y, x, sample);
      std::fill_n(to, in.channels, T(0));
      for (int64_t head = 0; head < in.heads && first < last; ++head) {
        T peak = -std::numeric_limits<T>::infinity();
        for (int64_t k = first; k < last; ++k) {
          const int64_t row = incremental::address(program_, key, k / key.width, k % key.width);
          const T score =
              row < 0 ? T(0) : scale * incremental::dot_row(q + head * size, keys + row + head * size, size);
          scores_[static_cast<size_t>(k - first)] = score;
          peak = score > peak || score != score ? score : peak;
        }
        const T total = incremental::exp_row(scores_.data(), last - first, peak);
        for (int64_t k = first; k < last; ++k) {
          const int64_t row = incremental::address(program_, value, k / value.width, k % value.width);
          if (row < 0) continue;
          const T share = scores_[static_cast<size_t>(k - first)] / total;
          incremental::add_scaled_row(values + row + head * width, share, width, to + head * width);
        }
      }
    }
  }

  // Element `step` of the sample becomes the value of its token; NaN for a token that is none.
  void write_element(int64_t step) const {
    const int32_t write = program_.writes[step % header_.channels];
    if (write < 0) return;
    const incremental::Shape sample_grid{header_.height, header_.width};
    const int64_t at = incremental::address(program_, program_.sources[write], row_at(header_, sample_grid, step),
                                            column_at(header_, sample_grid, step));
    for (int64_t sample = 0; sample < count_; ++sample) {
      const int64_t token = tokens(sample)[step];
      const bool valid = token >= 0 && token < all_.levels;
      state(sample)[at] = valid ? all_.values[token] : std::numeric_limits<T>::quiet_NaN();
    }
  }

  void draw_element(int64_t step) {
    const AdvanceInputs& inputs = all_.inputs;
    if (inputs.mode == Advance::kFollow && !all_.logits) return;
    const int64_t channel = step % header_.channels, steps = inputs.end - inputs.begin;
    const Source& source = program_.sources[program_.draws[channel]];
    const incremental::Shape sample_grid{header_.height, header_.width};
    const int64_t at = incremental::address(program_, source, row_at(header_, sample_grid, step),
                                            column_at(header_, sample_grid, step));
    for (int64_t sample = 0; sample < count_; ++sample) {
      const int64_t row = first_ + sample, index = row * steps + step - inputs.begin;
      int64_t* const token = tokens(sample) + step;
      const bool given = all_.known && all_.known[row * header_.steps + step];
      const T* const numbers = channels(source, at, sample, registers_.data());
      if (all_.logits) std::copy_n(numbers, header_.vocabulary, all_.logits + index * header_.vocabulary);
      T log_prob = 0;
      if (inputs.mode == Advance::kScore) log_prob = drawer_->score(numbers, token - channel, channel);
      if (inputs.mode == Advance::kDraw && !given) {
        drawer_->draw(numbers, token - channel, channel, inputs.seeds[row], all_.sample_ids[row * all_.id_stride], step,
                      token, &log_prob);
      }
      all_.log_prob[index] = log_prob;
    }
  }

  const Advancing<T>& all_;
  const Program& program_;
  const Header& header_;
  std::unique_ptr<incremental::Drawer<T>> drawer_;
  int64_t first_ = 0, count_ = 0;
  std::vector<T> zeros_, registers_, scores_;
  std::vector<const T*> pointers_, inputs_;
  std::vector<int64_t> addresses_, sites_;
  std::vector<Piece> pieces_;
  std::vector<int32_t> read_;  // of the pieces, their sources
};

struct Cpu {
  template <class T>
  static void advance(const Program& program, const AdvanceInputs& inputs, Tensor& log_prob, Tensor* logits) {
    const Advancing<T> all(program, inputs, log_prob, logits);
    const int64_t limit = thread_limit(), torch_threads = torch::stable::get_num_threads();
    const int64_t threads = limit > 0 ? std::min(limit, torch_threads) : torch_threads;
    // As many blocks for each thread, of as many samples.
    const int64_t rounds = (all.n + threads * kMostSamples - 1) / (threads * kMostSamples);
    const int64_t block = (all.n + threads * rounds - 1) / (threads * rounds);
    const int64_t blocks = (all.n + block - 1) / block;
    // Each weight is used about once a site.
    const int64_t cost = (inputs.end - inputs.begin) * (1000 + inputs.weights.numel() / 16) * block;
    parallel(blocks, cost, [&](int64_t begin, int64_t end) {
      Walker<T> walker(all);
      for (int64_t b = begin; b < end; ++b) walker.run(b * block, std::min(block, all.n - b * block));
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) {
  library.impl("incremental_advance", TORCH_BOX(&incremental_advance<Cpu>));
}

}  // namespace
}  // namespace pygen
