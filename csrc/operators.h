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
    // spline: [K widths | K heights | derivatives] for each element, in one tensor or three; bounds = left, right,
    // bottom,
    // top; minimums = bin width, bin height, derivative; where these or the tails differ along x's last dimension,
    // dimensions, (5, C), has the bounds and the tails
    "rational_quadratic_spline_forward(Tensor x, Tensor[] parameters, Tensor? dimensions, int bins, int tails, "
    "float[] bounds, float[] minimums, int parametrization, float sharpness, float boundary_slope, float scale, "
    "int event_dims) -> (Tensor y, Tensor ladj)",
    "rational_quadratic_spline_inverse(Tensor y, Tensor[] parameters, Tensor? dimensions, int bins, int tails, "
    "float[] bounds, float[] minimums, int parametrization, float sharpness, float boundary_slope, float scale, "
    "int event_dims) -> (Tensor x, Tensor ladj)",
    "rational_quadratic_spline_backward(Tensor x, Tensor[] parameters, Tensor? dimensions, Tensor grad_output, "
    "Tensor grad_ladj, int bins, int tails, float[] bounds, float[] minimums, int parametrization, float sharpness, "
    "float boundary_slope, float scale, int event_dims, bool inverse) -> (Tensor grad_input, Tensor grad_parameters)",
    // masked: samples (n, columns) are what a program of pygen/ops/masked_program.py reads of each sample
    "masked_affine_inverse(Tensor samples, Tensor weights, Tensor constants, Tensor program, Tensor device_program, "
    "int features, int activation, float limit, float offset, float epsilon) -> (Tensor x, Tensor ladj)",
    "masked_spline_inverse(Tensor samples, Tensor weights, Tensor constants, Tensor program, Tensor device_program, "
    "int features, Tensor? dimensions, int bins, int tails, float[] bounds, float[] minimums, int parametrization, "
    "float sharpness, float boundary_slope, float scale) -> (Tensor x, Tensor ladj)",
    "masked_backward(Tensor samples, Tensor weights, Tensor program, Tensor device_program, int outputs) -> Tensor",
    // speculative: draft_tokens (rows, k), -1 where there is none; logits (rows, k, vocabulary) and (rows, k + 1, ..)
    "speculative_accept(Tensor draft_tokens, Tensor draft_logits, Tensor target_logits, Tensor sample_ids, "
    "SymInt seed, Tensor? seeds, SymInt position, Tensor? positions) "
    "-> (Tensor tokens, Tensor accepted, Tensor log_prob)",
    // logistics: x (n, colours, ...), parameters (n, count, ...) as csrc/logistics.h has them, log_prob (n, ...); one
    // pixel a row where they are sampled, with x and known, (n, colours), for colours that are given
    "discretized_logistics_forward(Tensor x, Tensor parameters, int levels) -> Tensor log_prob",
    "discretized_logistics_backward(Tensor x, Tensor parameters, Tensor grad_log_prob, int levels) "
    "-> (Tensor grad_x, Tensor grad_parameters)",
    "discretized_logistics_sample(Tensor parameters, Tensor sample_ids, SymInt seed, Tensor? seeds, SymInt position, "
    "Tensor? positions, int colours, int levels, Tensor? x, Tensor? known) -> (Tensor x, Tensor log_prob)",
    // mixture: [K logits | K means | K log scales] for each element, in one tensor or three
    "logistic_mixture_forward(Tensor x, Tensor[] parameters, int event_dims) -> (Tensor y, Tensor ladj)",
    "logistic_mixture_inverse(Tensor y, Tensor[] parameters, int event_dims) -> (Tensor x, Tensor ladj)",
    "logistic_mixture_backward(Tensor x, Tensor[] parameters, Tensor grad_output, Tensor grad_ladj, int event_dims, "
    "bool inverse) -> (Tensor grad_input, Tensor grad_parameters)",
    // piecewise: a polynomial spline of degree 1 to 3; parameters in one tensor or one of each kind; bounds = left,
    // right,
    // bottom, top; minimums = bin width, bin height
    "piecewise_spline_forward(Tensor x, Tensor[] parameters, int degree, int bins, bool tails, float[] bounds, "
    "float[] minimums, float end_weight, float scale, int event_dims) -> (Tensor y, Tensor ladj)",
    "piecewise_spline_inverse(Tensor y, Tensor[] parameters, int degree, int bins, bool tails, float[] bounds, "
    "float[] minimums, float end_weight, float scale, int event_dims) -> (Tensor x, Tensor ladj)",
    "piecewise_spline_backward(Tensor x, Tensor[] parameters, Tensor grad_output, Tensor grad_ladj, int degree, "
    "int bins, bool tails, float[] bounds, float[] minimums, float end_weight, float scale, int event_dims, "
    "bool inverse) -> (Tensor grad_input, Tensor grad_parameters)",
    // schedule: steps, seeds and sample_ids hold one number per sample (or one for all) and take precedence
    "diffusion_step(Tensor sample, Tensor model_output, Tensor coefficients, SymInt step, Tensor? steps, "
    "Tensor[] history, Tensor? noise, SymInt seed, Tensor? seeds, Tensor? sample_ids, float low, float high) "
    "-> Tensor next",
    "diffusion_step_denoised(Tensor sample, Tensor model_output, Tensor coefficients, SymInt step, Tensor? steps, "
    "Tensor[] history, Tensor? noise, SymInt seed, Tensor? seeds, Tensor? sample_ids, float low, float high) "
    "-> (Tensor next, Tensor denoised)",
    "diffusion_step_backward(Tensor sample, Tensor model_output, Tensor coefficients, SymInt step, Tensor? steps, "
    "float low, float high, Tensor grad_next, Tensor? grad_denoised) -> (Tensor grad_sample, Tensor grad_model_output)",
    // noise
    "noise(Tensor sample_ids, SymInt[] shape, SymInt seed, Tensor? seeds, SymInt draw, Tensor? draws, "
    "ScalarType dtype, bool uniform) -> Tensor",
    // cache: scales with 8-bit caches; pages, (batch, pages of a sequence), where caches are pages; cos, sin, positions
    // of a rotary embedding; a window of 0 is everything before
    "attend_cached(Tensor query, Tensor? key, Tensor? value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor(c!) lengths, float scale, Tensor(d!)? key_scales=None, Tensor(e!)? value_scales=None, "
    "Tensor? pages=None, Tensor? mask=None, Tensor? cos=None, Tensor? sin=None, Tensor? positions=None, "
    "bool interleaved=False, int axes=1, bool sinks_in_cache=True, bool causal=True, int window=0, int sinks=0) "
    "-> Tensor",
    "append_cached(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!) lengths, "
    "Tensor(d!)? key_scales=None, Tensor(e!)? value_scales=None, Tensor? pages=None, Tensor? cos=None, "
    "Tensor? sin=None, Tensor? positions=None, bool interleaved=False, int axes=1, int window=0, int sinks=0) -> ()",
    // sampling: seeds and positions, (rows,) or (), take precedence over seed and position
    "sample_logits(Tensor logits, Tensor sample_ids, SymInt seed, Tensor? seeds, SymInt position, Tensor? positions, "
    "float temperature, int top_k, float top_p, float min_p=0.0, float typical_p=1.0, bool split_ties=False, "
    "Tensor? unconditional=None, float guidance_scale=1.0, Tensor? history=None, float repetition_penalty=1.0, "
    "Tensor? allowed=None) -> (Tensor token, Tensor log_prob)",
    "filter_logits(Tensor logits, float temperature, int top_k, float top_p, float min_p=0.0, float typical_p=1.0, "
    "bool split_ties=False, Tensor? unconditional=None, float guidance_scale=1.0, Tensor? history=None, "
    "float repetition_penalty=1.0, Tensor? allowed=None) -> Tensor log_probs",
    // incremental: steps begin .. end of a program of pygen/ops/incremental_program.py, for each row of state; action 0
    // follows the tokens, 1 scores them too, 2 draws those that are not known; logistics = levels, 0 for logits
    "incremental_advance(Tensor(a!) state, Tensor(b!) tokens, Tensor weights, Tensor program, Tensor device_program, "
    "int vocabulary, Tensor conditions, Tensor values, Tensor? known, Tensor sample_ids, SymInt seed, Tensor? seeds, "
    "SymInt begin, SymInt end, int action, int logistics, float temperature, int top_k, float top_p, float min_p, "
    "float "
    "typical_p, "
    "bool split_ties, bool with_logits) -> (Tensor log_prob, Tensor logits)",
    // wavelet: 2 x 2 blocks of a picture (n, c, 2 h, 2 w) as channels (n, 4 c, h, w), and back
    "wavelet_forward(Tensor x, bool haar) -> Tensor y",
    "wavelet_inverse(Tensor y, bool haar) -> Tensor x",
};

}  // namespace pygen
