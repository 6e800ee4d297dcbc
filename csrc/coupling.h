// The affine coupling of one element: y = x s + t with s = activation(a + offset) + epsilon, and log s.
//
//   exp                s = e^a                           (Dinh et al. 2017, RealNVP, eq. 7)
//   tanh               log s = limit tanh(a)             (FrEIA's clamps: tanh, atan and sigmoid)
//   atan               log s = limit 0.636 atan(a)
//   sigmoid_symmetric  log s = limit (2 sigmoid(a) - 1)
//   sigmoid            s = sigmoid(a)                    (Kingma & Dhariwal 2018, Glow; nflows: offset 2, epsilon 1e-3)
//   softplus           s = softplus(a)
//   softclip           log s = a / (1 + |a / limit|)     (zuko's monotonic affine)
#pragma once

#include "scalar.h"

namespace pygen {

// In the order of ACTIVATIONS in pygen/ops/coupling.py.
enum class Activation : int64_t { kExp, kTanh, kAtan, kSigmoidSymmetric, kSigmoid, kSoftplus, kSoftclip };
constexpr int64_t kActivations = 7;

// FrEIA's constant, just under 2/pi, kept so that its weights mean the same here.
constexpr double kAtanScale = 0.636;

template <class T>
struct Scale {
  T value;  // s
  T log;    // log s
};

template <class T>
struct ScaleSlope {
  T value;     // s
  T slope;     // ds/da
  T relative;  // d log s / da, which stays finite where s underflows
};

// log s before epsilon, for the activations that are bounded there.
template <Activation A, class T>
PYGEN_INLINE T log_scale(T a, T limit) {
  if constexpr (A == Activation::kTanh) return limit * scalar::tanh(a);
  if constexpr (A == Activation::kAtan) return limit * (T(kAtanScale) * scalar::atan(a));
  if constexpr (A == Activation::kSigmoidSymmetric) return limit * scalar::tanh(T(0.5) * a);  // the same function
  if constexpr (A == Activation::kSoftclip) return a / (T(1) + scalar::abs(a / limit));
  return a;
}

template <Activation A, class T>
PYGEN_INLINE T log_scale_slope(T a, T limit) {
  if constexpr (A == Activation::kTanh) {
    const T t = scalar::tanh(a);
    return limit * (T(1) - t * t);
  }
  if constexpr (A == Activation::kAtan) return limit * T(kAtanScale) / (T(1) + a * a);
  if constexpr (A == Activation::kSigmoidSymmetric) {
    const T t = scalar::tanh(T(0.5) * a);
    return T(0.5) * limit * (T(1) - t * t);
  }
  if constexpr (A == Activation::kSoftclip) {
    const T d = T(1) + scalar::abs(a / limit);
    return T(1) / (d * d);
  }
  return T(1);
}

template <Activation A, class T>
PYGEN_INLINE Scale<T> affine_scale(T a, T limit) {
  if constexpr (A == Activation::kSigmoid) {
    return {scalar::sigmoid(a), -scalar::softplus(-a)};
  } else if constexpr (A == Activation::kSoftplus) {
    const T s = scalar::softplus(a);
    // Far below zero softplus(a) is e^a, whose logarithm is known without going through a denormal.
    return {s, a < T(-40) ? a : scalar::log(s)};
  } else {
    const T log_s = log_scale<A>(a, limit);
    return {scalar::exp(log_s), log_s};
  }
}

template <class T>
PYGEN_INLINE Scale<T> add_epsilon(Scale<T> scale, T epsilon) {
  const T s = scale.value + epsilon;
  return {s, scalar::log(s)};
}

template <Activation A, class T>
PYGEN_INLINE ScaleSlope<T> affine_scale_slope(T a, T limit, T epsilon) {
  T s, slope, relative;
  if constexpr (A == Activation::kSigmoid) {
    s = scalar::sigmoid(a);
    relative = scalar::sigmoid(-a);
    slope = s * relative;
  } else if constexpr (A == Activation::kSoftplus) {
    s = scalar::softplus(a);
    slope = scalar::sigmoid(a);
    relative = a < T(-40) ? T(1) : slope / s;
  } else {
    s = scalar::exp(log_scale<A>(a, limit));
    relative = log_scale_slope<A>(a, limit);
    slope = s * relative;
  }
  return {s + epsilon, slope, epsilon == T(0) ? relative : slope / (s + epsilon)};
}

// Gradients of one element, from the side where x is: forward had output y = x s + t and ladj = sum log s, the inverse
// had output x = (y - t) / s and ladj = -sum log s.
template <class T>
struct AffineGradient {
  T input, raw_scale;
};

template <bool kInverse, class T>
PYGEN_INLINE AffineGradient<T> affine_gradient(T x, ScaleSlope<T> scale, T grad_output, T grad_ladj) {
  if constexpr (kInverse) {
    return {grad_output / scale.value, -scale.relative * (grad_output * x + grad_ladj)};
  } else {
    return {grad_output * scale.value, scale.slope * grad_output * x + scale.relative * grad_ladj};
  }
}

// Calls `f(Tag<A>{})` with the activation as a constant.
template <Activation A>
struct ActivationTag {
  static constexpr Activation value = A;
};

template <class F>
PYGEN_INLINE void for_activation(int64_t activation, F&& f) {
  switch (static_cast<Activation>(activation)) {
    case Activation::kExp:
      return f(ActivationTag<Activation::kExp>{});
    case Activation::kTanh:
      return f(ActivationTag<Activation::kTanh>{});
    case Activation::kAtan:
      return f(ActivationTag<Activation::kAtan>{});
    case Activation::kSigmoidSymmetric:
      return f(ActivationTag<Activation::kSigmoidSymmetric>{});
    case Activation::kSigmoid:
      return f(ActivationTag<Activation::kSigmoid>{});
    case Activation::kSoftplus:
      return f(ActivationTag<Activation::kSoftplus>{});
    case Activation::kSoftclip:
      return f(ActivationTag<Activation::kSoftclip>{});
  }
}

}  // namespace pygen
