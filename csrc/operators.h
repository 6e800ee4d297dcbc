// Every operator's schema, in one list: the table of contents. Defined into `pygen`, and for tests into `pygen_simt`.
#pragma once

#include <torch/csrc/stable/library.h>

namespace pygen {

// affine: scale = activation(raw_scale + offset) + epsilon; activation is the index in ACTIVATIONS of ops/coupling.py.
constexpr const char* kSchemas[] = {
    // coupling
    "affine_forward(Tensor x, Tensor? raw_scale, Tensor? shift, int activation, float limit, float offset, "
    "float epsilon, int event_dims) -> (Tensor y, Tensor ladj)",
    "affine_inverse(Tensor y, Tensor? raw_scale, Tensor? shift, int activation, float limit, float offset, "
    "float epsilon, int event_dims) -> (Tensor x, Tensor ladj)",
    "affine_backward(Tensor x, Tensor raw_scale, Tensor grad_output, Tensor grad_ladj, int activation, float limit, "
    "float offset, float epsilon, int event_dims, bool inverse) -> (Tensor grad_input, Tensor grad_raw_scale)",
    // schedule
    // noise
    // cache
    "attend_cached(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor(c!) lengths, float scale) -> Tensor",
    // sampling: seeds and positions, one per row or one for all, take precedence over seed and position
    "sample_logits(Tensor logits, Tensor? seeds, int seed, Tensor sample_ids, Tensor? positions, int position, "
    "float temperature, int top_k, float top_p) -> (Tensor token, Tensor log_prob)",
};

}  // namespace pygen
