// What the host checks and allocates for addressed noise, before a loop or a launch.
#pragma once

#include "noise.h"
#include "tensor.h"

namespace pygen {

// One number for all rows, (), or one per row, (rows,); int64 on the device of the data.
inline void check_per_row(const char* name, const Tensor& values, const Tensor& data, int64_t rows) {
  check(values.scalar_type() == ScalarType::Long, name, " has another dtype than int64");
  check(values.dim() == 0 || (values.dim() == 1 && values.size(0) == rows), name, " has shape ", shape_of(values),
        ", but expected () or (", rows, ",)");
  check(same_device(values, data), name, " is on another device than the data");
}

inline int64_t row_stride(const Tensor& values) { return values.dim() ? values.stride(0) : 0; }

inline NoiseAddresses noise_addresses(const Tensor& data, int64_t rows, const Tensor& sample_ids, int64_t seed,
                                      const std::optional<Tensor>& seeds, int64_t draw,
                                      const std::optional<Tensor>& draws) {
  check_per_row("sample_ids", sample_ids, data, rows);
  check(sample_ids.dim() == 1, "sample_ids has shape (), but expected (", rows, ",)");
  NoiseAddresses addresses;
  addresses.sample_ids = static_cast<const int64_t*>(sample_ids.data_ptr());
  addresses.sample_id_stride = row_stride(sample_ids);
  addresses.seed = seed;
  addresses.draw = draw;
  if (seeds) {
    check_per_row("seed", *seeds, data, rows);
    addresses.seeds = static_cast<const int64_t*>(seeds->data_ptr());
    addresses.seed_stride = row_stride(*seeds);
  }
  if (draws) {
    check_per_row("draw", *draws, data, rows);
    addresses.draws = static_cast<const int64_t*>(draws->data_ptr());
    addresses.draw_stride = row_stride(*draws);
  }
  return addresses;
}

constexpr int64_t kElementLimit = int64_t{1} << 34;  // 2^32 blocks of four

// (rows, *shape), and the number of elements of a row.
inline Tensor empty_noise(const Tensor& sample_ids, const std::vector<int64_t>& shape, ScalarType dtype,
                          int64_t* width) {
  check(sample_ids.dim() == 1, "sample_ids has shape ", shape_of(sample_ids), ", but expected (n,)");
  check(is_floating(dtype), "dtype is not supported: expected float32, float64, bfloat16 or float16");
  std::vector<int64_t> sizes{sample_ids.size(0)};
  bool empty = false, fits = true;
  for (const int64_t size : shape) {
    check(size >= 0, "shape has the size ", size, ", but expected sizes from 0");
    sizes.push_back(size);
    empty = empty || size == 0;
  }
  *width = empty ? 0 : 1;
  for (const int64_t size : shape) {
    fits = fits && (empty || size <= kElementLimit / *width);
    *width *= empty || !fits ? 1 : size;
  }
  check(fits, "shape has more than 2^34 elements, which is all that one draw has");
  return torch::stable::new_empty(sample_ids, sizes, dtype);
}

}  // namespace pygen
