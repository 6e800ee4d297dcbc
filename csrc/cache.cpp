// Cached attention on the CPU. A work item is a few query rows of one key/value head against one split of the keys;
// splits have a fixed size and merge in order, so that a result depends on neither the threads nor the batch.
#include <memory>

#include "cache_checks.h"
#include "cache_rows.h"

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

// A (batch, heads, places, width) tensor of any strides and any floating dtype.
struct View {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t stride[4] = {};
  View() = default;
  explicit View(const Tensor& x) : data(x.data_ptr()), dtype(x.scalar_type()) {
    for (int d = 0; d < 4; ++d) stride[d] = x.stride(d);
  }
  int64_t at(int64_t b, int64_t h, int64_t i) const { return b * stride[0] + h * stride[1] + i * stride[2]; }

  template <class Compute>
  void read(int64_t b, int64_t h, int64_t i, int64_t width, Compute* to) const {
    for_dtype(dtype, [&](auto zero) {
      copy_strided(static_cast<const decltype(zero)*>(data) + at(b, h, i), stride[3], width, to);
    });
  }
};

template <class Compute>
void turn_row(const cache::Rotary<Compute>& rotary, int64_t row, Compute* x) {
  const Compute *cos = rotary.cos + row * rotary.cos_stride, *sin = rotary.sin + row * rotary.sin_stride;
  const int64_t half = rotary.pairs / rotary.axes;
  const int64_t apart = rotary.interleaved ? 1 : half, step = rotary.interleaved ? 2 : 1;
  for (int64_t axis = 0; axis < rotary.axes; ++axis) {
    for (int64_t k = 0; k < half; ++k) {
      Compute* const pair = x + 2 * axis * half + k * step;
      const Compute first = pair[0], second = pair[apart], c = cos[axis * half + k], s = sin[axis * half + k];
      pair[0] = cache::turned_first(first, second, c, s);
      pair[apart] = cache::turned_second(first, second, c, s);
    }
  }
}

// A row of a key or a value into its place, and its scale into the scales'.
template <class Compute, class Stored>
void store_row(const Compute* x, int64_t width, Stored* to, float* scale) {
  if constexpr (cache::kScaled<Stored>) {
    float largest = 0;
    bool finite = true;
    for (int64_t d = 0; d < width; ++d) {
      largest = cache::higher(scalar::abs(x[d]), largest);
      finite &= scalar::abs(x[d]) <= std::numeric_limits<float>::max();
    }
    *scale = cache::row_scale<Stored>(finite ? largest : std::numeric_limits<float>::infinity());
    for (int64_t d = 0; d < width; ++d) cache::encode(x[d], *scale, to + d);
  } else if constexpr (is_16_bit<Stored>) {
    narrow_rows(x, width, to);
  } else {
    std::copy(x, x + width, to);
  }
}

// New tokens, and the cache that they go to.
template <class Compute, class Stored>
class Cache {
 public:
  Cache(const Caches& caches, const RotaryTensors& rotary, const OptionalTensor& key, const OptionalTensor& value,
        int64_t block, bool causal)
      : heads_(caches.heads()),
        batch_(caches.batch()),
        width_(caches.width()),
        sight_{block, caches.window, caches.sinks, kSplit, causal},
        layout_(layout_of(caches)),
        rotary_(rotary_of<Compute>(rotary)),
        keys_(array_of<Stored>(caches.keys)),
        values_(array_of<Stored>(caches.values)),
        key_scales_(scales_of(caches.key_scales)),
        value_scales_(scales_of(caches.value_scales)),
        appended_(key.has_value()),
        before_(static_cast<size_t>(batch_)) {
    if (appended_) {
      new_keys_ = View(*key);
      new_values_ = View(*value);
    }
    int32_t* length = static_cast<int32_t*>(caches.lengths.data_ptr());
    for (int64_t b = 0; b < batch_; ++b) {
      int32_t& own = length[b * caches.lengths.stride(0)];
      before_[b] = cache::length_before(own, appended_, sight_, layout_);
      if (before_[b] >= 0 && !readable(b)) before_[b] = -1;
      if (before_[b] >= 0 && appended_) own += static_cast<int32_t>(block);
    }
  }

  void append() const {
    if (!appended_) return;
    parallel(batch_ * heads_, 1 + sight_.block * width_, [this](int64_t from, int64_t to) {
      const auto row = std::make_unique_for_overwrite<Compute[]>(static_cast<size_t>(width_));
      for (int64_t item = from; item < to; ++item) append(item / heads_, item % heads_, row.get());
    });
  }

 protected:
  int64_t heads_, batch_, width_;
  cache::Sight sight_;
  cache::Layout layout_;
  cache::Rotary<Compute> rotary_;
  cache::Array<Stored> keys_, values_;
  cache::Array<float> key_scales_, value_scales_;
  bool appended_;
  View new_keys_, new_values_;
  std::vector<int64_t> before_;

 private:
  bool readable(int64_t b) const {
    const int64_t before = before_[b];
    if (rotary_.cos) {
      for (int64_t i = 0; i < sight_.block; ++i) {
        if (!rotary_.has_row(b, before, i)) return false;
      }
    }
    if (layout_.pages) {
      for (int64_t page = 0; page << layout_.page_shift < before + sight_.block; ++page) {
        if (!cache::page_exists(layout_, sight_, before, b, page)) return false;
      }
    }
    return true;
  }

  void append(int64_t b, int64_t h, Compute* row) const {
    if (before_[b] < 0) return;
    const cache::Places<Stored> keys(keys_, layout_, b, h), values(values_, layout_, b, h);
    const cache::Places<float> key_scales(key_scales_, layout_, b, h), value_scales(value_scales_, layout_, b, h);
    for (int64_t i = 0; i < sight_.block; ++i) {
      const int64_t position = before_[b] + i;
      new_keys_.read(b, h, i, width_, row);
      if (rotary_.cos) turn_row(rotary_, rotary_.row(b, before_[b], i), row);
      store_row(row, width_, keys.at(position), cache::kScaled<Stored> ? key_scales.at(position) : nullptr);
      new_values_.read(b, h, i, width_, row);
      store_row(row, width_, values.at(position), cache::kScaled<Stored> ? value_scales.at(position) : nullptr);
    }
  }
};

template <class Compute, class Stored>
class Attention : Cache<Compute, Stored> {
 public:
  Attention(const Caches& caches, const RotaryTensors& rotary, const OptionalTensor& key, const OptionalTensor& value,
            const Tensor& query, const OptionalTensor& mask, double scale, bool causal, Tensor& out)
      : Cache<Compute, Stored>(caches, rotary, key, value, query.size(2), causal),
        query_(query),
        out_(out),
        mask_(mask_of(mask)),
        group_(query.size(1) / this->heads_),
        block_(query.size(2)),
        scale_(static_cast<Compute>(scale)) {
    for (const int64_t before : this->before_) {
      if (before >= 0) splits_ = std::max(splits_, sight_.splits(before));
    }
  }

  void run() const {
    this->append();
    const int64_t tiles_per_head = (group_ * block_ + kTileRows - 1) / kTileRows;
    const int64_t tiles = this->batch_ * this->heads_ * tiles_per_head;
    const int64_t keys = std::min(kSplit, sight_.most_splits(layout_.capacity) == 1 ? layout_.capacity : kSplit);
    const int64_t cost = 200 + keys * width_ * std::min(kTileRows, group_ * block_) / 5;
    const auto state = static_cast<size_t>(State<Compute>::size(width_));
    if (tiles >= 2 * thread_count() || splits_ == 1) {
      parallel(tiles, cost * splits_, [&](int64_t from, int64_t to) {
        const auto memory = std::make_unique_for_overwrite<Compute[]>(2 * state + scratch_size());
        const State<Compute> total(memory.get()), part(memory.get() + state);
        for (int64_t tile = from; tile < to; ++tile) {
          const Rows rows(*this, tile, tiles_per_head);
          attend(rows, 0, total, memory.get() + 2 * state, true);
          for (int64_t split = 1; split < rows.splits; ++split) {
            attend(rows, split, part, memory.get() + 2 * state, split == sight_.sink_splits());
            merge_rows(total, part, rows.count, width_);
          }
          write(rows, total);
        }
      });
      return;
    }
    // Too few heads to keep the threads busy: the splits go side by side, and merge in the same order as above.
    const auto states = std::make_unique_for_overwrite<Compute[]>(static_cast<size_t>(tiles * splits_) * state);
    const auto state_of = [&](int64_t item) {
      return State<Compute>(states.get() + static_cast<size_t>(item) * state);
    };
    parallel(tiles * splits_, cost, [&](int64_t from, int64_t to) {
      const auto scratch = std::make_unique_for_overwrite<Compute[]>(scratch_size());
      for (int64_t item = from; item < to; ++item) {
        const Rows rows(*this, item / splits_, tiles_per_head);
        const int64_t split = item % splits_;
        if (split == 0 || split < rows.splits) attend(rows, split, state_of(item), scratch.get(), true);
      }
    });
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Rows rows(*this, tile, tiles_per_head);
      const State<Compute> total = state_of(tile * splits_);
      for (int64_t split = 1; split < rows.splits; ++split) {
        merge_rows(total, state_of(tile * splits_ + split), rows.count, width_);
      }
      write(rows, total);
    }
  }

 private:
  using Base = Cache<Compute, Stored>;
  using Base::layout_;
  using Base::rotary_;
  using Base::sight_;
  using Base::width_;

  // Up to kTileRows of the (group, block) query rows that one key/value head serves.
  struct Rows {
    int64_t batch, head, first, count, before, splits;
    int64_t mask[kTileRows];
    Rows(const Attention& x, int64_t tile, int64_t tiles_per_head)
        : batch(tile / tiles_per_head / x.heads_),
          head(tile / tiles_per_head % x.heads_),
          first(tile % tiles_per_head * kTileRows),
          count(std::min(kTileRows, x.group_ * x.block_ - first)),
          before(x.before_[batch]),
          splits(before < 0 ? 0 : x.sight_.splits(before)) {
      for (int64_t r = 0; r < count; ++r) mask[r] = x.mask_.row(batch, query_head(x, r), token(x, r));
    }
    int64_t query_head(const Attention& x, int64_t r) const { return head * x.group_ + (first + r) / x.block_; }
    int64_t token(const Attention& x, int64_t r) const { return (first + r) % x.block_; }
  };

  static int64_t thread_count() {
    const int64_t threads = torch::stable::get_num_threads(), limit = thread_limit();
    return limit > 0 && limit < threads ? limit : threads;
  }

  size_t scratch_size() const { return static_cast<size_t>((kTileRows + kTile) * width_); }

  void gather_query(const Rows& rows, bool sinks, Compute* query) const {
    for (int64_t r = 0; r < rows.count; ++r, query += width_) {
      const int64_t i = rows.token(*this, r);
      query_.read(rows.batch, rows.query_head(*this, r), i, width_, query);
      if (rotary_.cos) {
        turn_row(
            rotary_,
            sinks ? rotary_.row_for_sinks(rows.batch, rows.before, i, sight_) : rotary_.row(rows.batch, rows.before, i),
            query);
      }
      for (int64_t d = 0; d < width_; ++d) query[d] *= scale_;
    }
  }

  // `fresh`: the scratch does not hold the query rows as this split takes them.
  void attend(const Rows& rows, int64_t split, const State<Compute>& state, Compute* scratch, bool fresh) const {
    const int64_t b = rows.batch, h = rows.head;
    const bool sinks = split < sight_.sink_splits();
    int64_t first[kTileRows] = {}, last[kTileRows] = {}, begin = 0, end = 0;
    if (rows.before >= 0) {
      if (fresh) gather_query(rows, sinks, scratch);
      begin = sight_.begin(rows.before, split);
      for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t i = rows.token(*this, r);
        first[r] = sinks ? 0 : sight_.first(rows.before, i);
        last[r] = sight_.last(rows.before, i);
        end = std::max(end, last[r]);
      }
      end = std::min(end, sight_.end(rows.before, split));
    }
    attend_rows(Split<Compute, Stored>{scratch,
                                       {this->keys_, layout_, b, h},
                                       {this->values_, layout_, b, h},
                                       {this->key_scales_, layout_, b, h},
                                       {this->value_scales_, layout_, b, h},
                                       mask_,
                                       rows.count,
                                       width_,
                                       begin,
                                       end,
                                       first,
                                       last,
                                       rows.mask,
                                       state.peak,
                                       state.sum,
                                       state.accumulator,
                                       scratch + kTileRows * width_});
  }

  // A row that did not fit is marked by NaN; one that saw nothing is 0.
  void write(const Rows& rows, const State<Compute>& state) const {
    for_dtype(out_.dtype, [&](auto zero) {
      using Out = decltype(zero);
      for (int64_t r = 0; r < rows.count; ++r) {
        Out* to = static_cast<Out*>(out_.data) + out_.at(rows.batch, rows.query_head(*this, r), rows.token(*this, r));
        const Compute sum = rows.before >= 0 && state.sum[r] == 0 ? Compute(1) : state.sum[r];
        for (int64_t d = 0; d < width_; ++d) to[d] = static_cast<Out>(state.accumulator[r * width_ + d] / sum);
      }
    });
  }

  View query_, out_;
  cache::Mask mask_;
  int64_t group_, block_, splits_ = 1;
  Compute scale_;
};

Tensor attend_cached(Tensor query, OptionalTensor key, OptionalTensor value, Tensor key_cache, Tensor value_cache,
                     Tensor lengths, double scale, OptionalTensor key_scales, OptionalTensor value_scales,
                     OptionalTensor pages, OptionalTensor mask, OptionalTensor cos, OptionalTensor sin,
                     OptionalTensor positions, bool interleaved, int64_t axes, bool sinks_in_cache, bool causal,
                     int64_t window, int64_t sinks) {
  const Caches caches{key_cache, value_cache, lengths, key_scales, value_scales, pages, window, sinks};
  const RotaryTensors rotary{cos, sin, positions, interleaved, axes, sinks_in_cache};
  check_attend_cached(query, key, value, caches, mask, rotary);
  Tensor out = torch::stable::new_empty(query, query.sizes());
  if (out.numel() == 0) return out;
  for_stored(key_cache.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    Attention<typename arithmetic<Stored>::type, Stored>(caches, rotary, key, value, query, mask, scale, causal, out)
        .run();
  });
  return out;
}

void append_cached(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor lengths,
                   OptionalTensor key_scales, OptionalTensor value_scales, OptionalTensor pages, OptionalTensor cos,
                   OptionalTensor sin, OptionalTensor positions, bool interleaved, int64_t axes, int64_t window,
                   int64_t sinks) {
  const Caches caches{key_cache, value_cache, lengths, key_scales, value_scales, pages, window, sinks};
  const RotaryTensors rotary{cos, sin, positions, interleaved, axes};
  check_append_cached(key, value, caches, rotary);
  for_stored(key_cache.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    Cache<typename arithmetic<Stored>::type, Stored>(caches, rotary, key, value, key.size(2), true).append();
  });
}

}  // namespace
}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) {
  library.impl("attend_cached", TORCH_BOX(&pygen::attend_cached));
  library.impl("append_cached", TORCH_BOX(&pygen::append_cached));
}
