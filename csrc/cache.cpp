// Cached attention on the CPU. A work item is a few query rows of one key/value head against one split of the keys;
// splits have a fixed size and merge in order, so that a result depends on neither the threads nor the batch.
#include "cache_rows.h"

#include <memory>

#include "cache_checks.h"

namespace pygen {
namespace {

constexpr int64_t kSplit = 512;  // keys in a split

// The state of some query rows: what attend_rows writes for one split, or the merger of several.
template <class Compute>
struct State {
  Compute *peak, *sum, *accumulator;
  explicit State(Compute* memory) : peak(memory), sum(memory + kTileRows), accumulator(sum + kTileRows) {}
  static int64_t size(int64_t width) { return kTileRows * (width + 2); }
};

template <class Compute>
void merge_rows(const State<Compute>& into, const State<Compute>& from, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const Compute peak = cache::higher(from.peak[r], into.peak[r]);
    const Compute old = cache::shrinkage(into.peak[r], peak), fresh = cache::shrinkage(from.peak[r], peak);
    into.sum[r] = into.sum[r] * old + from.sum[r] * fresh;
    Compute* a = into.accumulator + r * width;
    const Compute* b = from.accumulator + r * width;
    for (int64_t d = 0; d < width; ++d) a[d] = a[d] * old + b[d] * fresh;
    into.peak[r] = peak;
  }
}

// A (batch, heads, places, width) tensor of any strides.
struct View {
  void* data;
  ScalarType dtype;
  int64_t stride[4];
  explicit View(const Tensor& x) : data(x.data_ptr()), dtype(x.scalar_type()) {
    for (int d = 0; d < 4; ++d) stride[d] = x.stride(d);
  }
  int64_t at(int64_t b, int64_t h, int64_t i) const { return b * stride[0] + h * stride[1] + i * stride[2]; }
};

template <class Compute, class Stored>
class Attention {
 public:
  Attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_cache,
            const Tensor& value_cache, const Tensor& lengths, double scale, Tensor& out)
      : query_(query),
        new_keys_(key),
        new_values_(value),
        keys_(key_cache),
        values_(value_cache),
        out_(out),
        before_(query.size(0)),
        batch_(query.size(0)),
        heads_(key_cache.size(1)),
        group_(query.size(1) / heads_),
        block_(query.size(2)),
        width_(query.size(3)),
        scale_(static_cast<Compute>(scale)) {
    int32_t* length = static_cast<int32_t*>(lengths.data_ptr());
    for (int64_t b = 0; b < batch_; ++b) {
      int32_t& own = length[b * lengths.stride(0)];
      before_[b] = cache::length_before(own, block_, key_cache.size(2));
      if (before_[b] >= 0) own += static_cast<int32_t>(block_);
      longest_ = std::max(longest_, before_[b] + block_);
    }
  }

  void run() {
    parallel(batch_ * heads_, 1 + block_ * width_, [this](int64_t from, int64_t to) {
      for (int64_t item = from; item < to; ++item) append(item / heads_, item % heads_);
    });
    const int64_t tiles_per_head = (group_ * block_ + kTileRows - 1) / kTileRows;
    const int64_t tiles = batch_ * heads_ * tiles_per_head;
    const int64_t splits = std::max<int64_t>(1, (longest_ + kSplit - 1) / kSplit);
    const int64_t cost = 200 + std::min(longest_, kSplit) * width_ * std::min(kTileRows, group_ * block_) / 5;
    const int64_t state = State<Compute>::size(width_);
    if (tiles >= 2 * thread_count() || splits == 1) {
      parallel(tiles, cost * splits, [&](int64_t from, int64_t to) {
        const auto memory = std::make_unique_for_overwrite<Compute[]>(2 * state + scratch_size());
        const State<Compute> total(memory.get()), part(memory.get() + state);
        for (int64_t tile = from; tile < to; ++tile) {
          const Rows rows(*this, tile, tiles_per_head);
          gather_query(rows, memory.get() + 2 * state);
          attend(rows, 0, total, memory.get() + 2 * state);
          for (int64_t split = 1; split < rows.splits(); ++split) {
            attend(rows, split, part, memory.get() + 2 * state);
            merge_rows(total, part, rows.count, width_);
          }
          write(rows, total);
        }
      });
      return;
    }
    // Too few heads to keep the threads busy: the splits go side by side, and merge in the same order as above.
    const auto states = std::make_unique_for_overwrite<Compute[]>(tiles * splits * state);
    parallel(tiles * splits, cost, [&](int64_t from, int64_t to) {
      const auto scratch = std::make_unique_for_overwrite<Compute[]>(scratch_size());
      for (int64_t item = from; item < to; ++item) {
        const Rows rows(*this, item / splits, tiles_per_head);
        if (item % splits && item % splits >= rows.splits()) continue;
        gather_query(rows, scratch.get());
        attend(rows, item % splits, State<Compute>(states.get() + item * state), scratch.get());
      }
    });
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Rows rows(*this, tile, tiles_per_head);
      const State<Compute> total(states.get() + tile * splits * state);
      for (int64_t split = 1; split < rows.splits(); ++split) {
        merge_rows(total, State<Compute>(states.get() + (tile * splits + split) * state), rows.count, width_);
      }
      write(rows, total);
    }
  }

 private:
  // Up to kTileRows of the (group, block) query rows that one key/value head serves.
  struct Rows {
    int64_t batch, head, first, count, last = 0;
    int64_t seen[kTileRows];
    Rows(const Attention& x, int64_t tile, int64_t tiles_per_head)
        : batch(tile / tiles_per_head / x.heads_),
          head(tile / tiles_per_head % x.heads_),
          first(tile % tiles_per_head * kTileRows),
          count(std::min(kTileRows, x.group_ * x.block_ - first)) {
      for (int64_t r = 0; r < count; ++r) {
        seen[r] = x.before_[batch] < 0 ? 0 : x.before_[batch] + (first + r) % x.block_ + 1;
        last = std::max(last, seen[r]);
      }
    }
    int64_t splits() const { return (last + kSplit - 1) / kSplit; }
  };

  static int64_t thread_count() {
    const int64_t threads = torch::stable::get_num_threads(), limit = thread_limit();
    return limit > 0 && limit < threads ? limit : threads;
  }

  int64_t scratch_size() const { return (kTileRows + kTile) * width_; }

  void append(int64_t b, int64_t h) const {
    if (before_[b] < 0) return;
    for (int64_t i = 0; i < block_; ++i) {
      store(new_keys_, new_keys_.at(b, h, i), static_cast<Stored*>(keys_.data) + keys_.at(b, h, before_[b] + i));
      store(new_values_, new_values_.at(b, h, i),
            static_cast<Stored*>(values_.data) + values_.at(b, h, before_[b] + i));
    }
  }

  void store(const View& from, int64_t offset, Stored* to) const {
    for_dtype(from.dtype, [&](auto zero) {
      const auto* x = static_cast<const decltype(zero)*>(from.data) + offset;
      for (int64_t d = 0; d < width_; ++d) to[d] = static_cast<Stored>(x[d * from.stride[3]]);
    });
  }

  void gather_query(const Rows& rows, Compute* query) const {
    for_dtype(query_.dtype, [&](auto zero) {
      for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t row = rows.first + r;
        const auto* x = static_cast<const decltype(zero)*>(query_.data) +
                        query_.at(rows.batch, rows.head * group_ + row / block_, row % block_);
        for (int64_t d = 0; d < width_; ++d) {
          query[r * width_ + d] = static_cast<Compute>(x[d * query_.stride[3]]) * scale_;
        }
      }
    });
  }

  void attend(const Rows& rows, int64_t split, const State<Compute>& state, Compute* scratch) const {
    const int64_t begin = split * kSplit;
    attend_rows(Split<Compute, Stored>{
        scratch, static_cast<const Stored*>(keys_.data) + keys_.at(rows.batch, rows.head, 0),
        static_cast<const Stored*>(values_.data) + values_.at(rows.batch, rows.head, 0), keys_.stride[2],
        values_.stride[2], rows.count, width_, begin, std::min(begin + kSplit, rows.last), rows.seen, state.peak,
        state.sum, state.accumulator, scratch + kTileRows * width_});
  }

  void write(const Rows& rows, const State<Compute>& state) const {
    for_dtype(out_.dtype, [&](auto zero) {
      using Out = decltype(zero);
      for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t row = rows.first + r;
        Out* to = static_cast<Out*>(out_.data) + out_.at(rows.batch, rows.head * group_ + row / block_, row % block_);
        // A row that did not fit has seen nothing: 0/0 is the NaN that marks it.
        for (int64_t d = 0; d < width_; ++d) {
          to[d] = static_cast<Out>(state.accumulator[r * width_ + d] / state.sum[r]);
        }
      }
    });
  }

  View query_, new_keys_, new_values_, keys_, values_, out_;
  std::vector<int64_t> before_;
  int64_t batch_, heads_, group_, block_, width_, longest_ = 0;
  Compute scale_;
};

Tensor attend_cached(Tensor query, Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor lengths,
                     double scale) {
  check_attend_cached(query, key, value, key_cache, value_cache, lengths);
  Tensor out = torch::stable::new_empty(query, query.sizes());
  if (out.numel() == 0) return out;
  for_dtype(key_cache.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    Attention<typename arithmetic<Stored>::type, Stored>(query, key, value, key_cache, value_cache, lengths, scale, out)
        .run();
  });
  return out;
}

}  // namespace
}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) { library.impl("attend_cached", TORCH_BOX(&pygen::attend_cached)); }
