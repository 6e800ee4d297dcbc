// Shares of a whole from unconstrained parameters, softmax with a minimum, and their gradients:
//
//   s_j = least + rest e^(u_j) / sum_k e^(u_k),   du_j = (s_j - least) (ds_j - sum_k (s_k - least) ds_k / rest).
//
// A group of L elements is taken together, "row j" of it being L neighbouring numbers, one an element.
#pragma once

#include "scalar.h"

namespace pygen {

// A share is least + rest softmax(u).
template <class T>
struct Shares {
  T least, rest;
};

// Adds a term to a sum, and what rounding drops of it to the next term (Kahan 1965): K shares add to 1.
template <class T>
PYGEN_INLINE void add_exactly(T term, T& sum, T& lost) {
  const T whole = term - lost, next = sum + whole;
  lost = (next - sum) - whole;
  sum = next;
}

// Rows 0 .. K-1 of unconstrained parameters turned to shares.
template <int L, class T>
PYGEN_INLINE void to_shares(T* rows, int bins, T scale, const Shares<T>& shares) {
  T peak[L], total[L], lost[L];
  PYGEN_LANES
  for (int l = 0; l < L; ++l) {
    peak[l] = -std::numeric_limits<T>::infinity();
    total[l] = lost[l] = T(0);
  }
  for (int j = 0; j < bins; ++j) {
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      rows[j * L + l] *= scale;
      peak[l] = scalar::at_least(rows[j * L + l], peak[l]);
    }
  }
  for (int j = 0; j < bins; ++j) {
    PYGEN_LANES
    for (int l = 0; l < L; ++l) {
      const T e = scalar::exp(rows[j * L + l] - peak[l]);
      rows[j * L + l] = e;
      add_exactly(e, total[l], lost[l]);
    }
  }
  PYGEN_LANES
  for (int l = 0; l < L; ++l) total[l] = shares.rest / total[l];
  for (int j = 0; j < bins; ++j) {
    PYGEN_LANES
    for (int l = 0; l < L; ++l) rows[j * L + l] = shares.least + total[l] * rows[j * L + l];
  }
}

// From the gradient of a share to that of its unconstrained parameter, given the mean of the gradients over all shares.
template <class T>
PYGEN_INLINE T share_gradient(T share, T gradient, T mean, T scale, Shares<T> shares) {
  return scale * (share - shares.least) * (gradient - mean);
}

// The mean under softmax of the gradients of rows 0 .. K-1 of shares; gradient(j, to) fills L numbers with those of
// row j.
template <int L, class T, class Gradient>
PYGEN_INLINE void mean_gradient(const T* rows, int bins, const Shares<T>& shares, const Gradient& gradient, T* mean) {
  // Where minimum sizes leave no room the shares are constant.
  const T over_rest = shares.rest > T(0) ? T(1) / shares.rest : T(0), least = shares.least;
  T own[L];
  PYGEN_LANES
  for (int l = 0; l < L; ++l) mean[l] = T(0);
  for (int j = 0; j < bins; ++j) {
    const T* const row = rows + j * L;
    gradient(j, own);
    PYGEN_LANES
    for (int l = 0; l < L; ++l) mean[l] += over_rest * (row[l] - least) * own[l];
  }
}

// Rows 0 .. K-1 of shares turned to the gradient of their unconstrained parameters.
template <int L, class T, class Gradient>
PYGEN_INLINE void share_gradients(T* rows, int bins, T scale, const Shares<T>& shares, const Gradient& gradient) {
  T mean[L], own[L];
  mean_gradient<L>(rows, bins, shares, gradient, mean);
  for (int j = 0; j < bins; ++j) {
    T* const row = rows + j * L;
    gradient(j, own);
    PYGEN_LANES
    for (int l = 0; l < L; ++l) row[l] = share_gradient(row[l], own[l], mean[l], scale, shares);
  }
}

}  // namespace pygen
