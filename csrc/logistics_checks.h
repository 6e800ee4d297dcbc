// What every device checks for the discretized mixture of logistics, before a loop or a launch.
#pragma once

#include "logistics.h"
#include "sampling_checks.h"
#include "tensor.h"

namespace pygen {

inline void check_levels(int64_t levels) {
  check(levels >= 2 && levels <= (1 << 16), "levels is ", levels, ", but expected 2 to 65536");
}

// The number of mixtures of `count` parameters for a pixel.
inline int check_mixtures(int64_t colours, int64_t count) {
  check(colours == 1 || colours == 3, "x has ", colours, " colours, but expected 1 or 3");
  const int64_t each = logistics::parameter_count(static_cast<int>(colours), 1);
  check(count > 0 && count % each == 0 && count <= each * logistics::kMaxMixtures, "parameters has ", count,
        " values for a pixel, but expected ", each, " for each of 1 to ", logistics::kMaxMixtures, " mixtures");
  return static_cast<int>(count / each);
}

// x (n, colours, ...) and parameters (n, count, ...). Returns the number of mixtures.
inline int check_logistics(const Tensor& x, const Tensor& parameters, int64_t levels) {
  check(is_floating(x.scalar_type()), "x has a dtype that is not supported: expected a floating dtype");
  check(is_floating(parameters.scalar_type()),
        "parameters has a dtype that is not supported: expected a floating dtype");
  check(same_device(parameters, x), "parameters is on another device than x");
  check(x.dim() >= 2, "x has shape ", shape_of(x), ", but expected (n, colours, ...)");
  bool same = parameters.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = d == 1 || parameters.size(d) == x.size(d);
  check(same, "parameters has shape ", shape_of(parameters), ", but expected that of x, ", shape_of(x),
        ", but for the number of channels");
  check_levels(levels);
  return check_mixtures(x.size(1), parameters.size(1));
}

// The shape of x without its colours.
inline std::vector<int64_t> pixel_sizes(const Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.erase(sizes.begin() + 1);
  return sizes;
}

inline void check_grad_log_prob(const Tensor& x, const Tensor& grad) {
  const std::vector<int64_t> sizes = pixel_sizes(x);
  check(static_cast<size_t>(grad.dim()) == sizes.size() && std::equal(sizes.begin(), sizes.end(), grad.sizes().begin()),
        "grad_log_prob has shape ", shape_of(grad), ", but expected the shape of x without its colours, ", shape_of(x));
  check(is_floating(grad.scalar_type()), "grad_log_prob has a dtype that is not supported");
  check(same_device(grad, x), "grad_log_prob is on another device than x");
}

// (n, c, ...) with c last: a view.
inline Tensor channels_last(Tensor x) {
  for (int64_t d = 1; d + 1 < x.dim(); ++d) x = torch::stable::transpose(x, d, d + 1);
  return x;
}

inline int check_draw(const Tensor& parameters, const Tensor& sample_ids, int64_t colours, int64_t levels,
                      const std::optional<Tensor>& x, const std::optional<Tensor>& known) {
  check(is_floating(parameters.scalar_type()),
        "parameters has a dtype that is not supported: expected a floating dtype");
  check(parameters.dim() == 2, "parameters has shape ", shape_of(parameters), ", but expected (n, parameters)");
  const int mixtures = check_mixtures(colours, parameters.size(1));
  check_levels(levels);
  check_sample_ids(sample_ids, parameters);
  check(x.has_value() == known.has_value(), "x and known come together, but there is only one of them");
  if (x) {
    for (const Tensor* part : {&*x, &*known}) {
      check(part->dim() == 2 && part->size(0) == parameters.size(0) && part->size(1) == colours,
            "x or known has shape ", shape_of(*part), ", but expected (", parameters.size(0), ", ", colours, ")");
      check(same_device(*part, parameters), "x or known is on another device than parameters");
    }
    check(x->scalar_type() == sum_dtype(parameters), "x has another dtype than the samples");
    check(known->scalar_type() == ScalarType::Bool, "known must be bool");
  }
  return mixtures;
}

// Pixels to draw, one a row.
template <class Stored, class T>
struct Draws {
  Grid<Stored> parameters;
  Grid<T> given;
  Grid<bool> known;
  bool any_known;
  int colours, mixtures, levels;
  int64_t rows;
  PerRow seeds, positions;
  const int64_t* sample_ids;
  int64_t id_stride;
  T *x, *log_prob;  // (rows, colours)

  int64_t scratch_size() const { return logistics::kDrawArrays * logistics::padded(mixtures); }

  PYGEN_INLINE void draw(int64_t row, T* scratch) const {
    bool fixed[3] = {};
    T* const values = x + row * colours;
    if (any_known) {
      for (int c = 0; c < colours; ++c) {
        fixed[c] = known.row(row)[c * known.stride];
        values[c] = given.row(row)[c * given.stride];
      }
    }
    const logistics::Pixel<Stored, T> pixel{parameters.row(row), parameters.stride, mixtures, colours};
    logistics::draw_pixel(pixel, levels, static_cast<uint64_t>(seeds[row]),
                          static_cast<uint64_t>(sample_ids[row * id_stride]), static_cast<uint64_t>(positions[row]),
                          fixed, values, log_prob + row * colours, scratch);
  }
};

// Checks the arguments, and calls run(draws) with the C++ type of the parameters. Returns x and the log-probabilities.
template <class Run>
inline std::tuple<Tensor, Tensor> draw_pixels(const Tensor& parameters, const Tensor& sample_ids, int64_t seed,
                                              const std::optional<Tensor>& seeds, int64_t position,
                                              const std::optional<Tensor>& positions, int64_t colours, int64_t levels,
                                              const std::optional<Tensor>& x, const std::optional<Tensor>& known,
                                              const Run& run) {
  const int mixtures = check_draw(parameters, sample_ids, colours, levels, x, known);
  const int64_t rows = parameters.size(0);
  Tensor drawn = torch::stable::new_empty(parameters, {rows, colours}, sum_dtype(parameters));
  Tensor log_prob = torch::stable::new_empty(parameters, {rows, colours}, sum_dtype(parameters));
  for_dtype(parameters.scalar_type(), [&](auto zero) {
    using Stored = decltype(zero);
    using T = typename arithmetic<Stored>::type;
    run(Draws<Stored, T>{grid_of<Stored>(parameters), grid_of<T>(x), grid_of<bool>(known), known.has_value(),
                         static_cast<int>(colours), mixtures, static_cast<int>(levels), rows,
                         per_row("seed", seeds, seed, parameters), per_row("position", positions, position, parameters),
                         static_cast<const int64_t*>(sample_ids.data_ptr()), sample_ids.stride(0),
                         static_cast<T*>(drawn.mutable_data_ptr()), static_cast<T*>(log_prob.mutable_data_ptr())});
  });
  return {drawn, log_prob};
}

}  // namespace pygen
