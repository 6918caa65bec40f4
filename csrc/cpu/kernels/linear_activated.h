// A block of a product and the activation of an MLP, to where they belong.
#pragma once
#include <bigkernels/layers.h>

#include "gemm.h"
#include "slope.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

// Vector v of a row of `all` elements; the lanes beyond are zero.
template <class T>
BK_INLINE vf vector_of(const T* p, int64_t all, int v) {
  int64_t count = all - v * W;
  return count >= W ? load(p + v * W) : count > 0 ? load(p + v * W, count) : vf{};
}
template <class T>
BK_INLINE void put_row(T* to, const vf* y, int64_t all, bool stream) {
  if (stream) {
    for (int v = 0; v < kVectors; v += 2) stream2(to + v * W, y[v], y[v + 1]);
    return;
  }
  for (int v = 0; v < kVectors; ++v) {
    int64_t count = all - v * W;
    if (count >= W) {
      store(to + v * W, y[v]);
    } else if (count > 0) {
      store(to + v * W, y[v], count);
    }
  }
}

// What is written of the product is what backward reads again, so that the activation is of the rounded product.
template <class T, Activation kind>
void write_kind(const ActivatedLinear& a, const float* c, const float* bias, int64_t width, int64_t row,
                int64_t column) {
  int64_t rows = a.m - row < kSide ? a.m - row : kSide, all = width - column < kSide ? width - column : kSide;
  vf added[kVectors];
  for (int v = 0; v < kVectors; ++v) added[v] = bias ? vector_of(bias + column, all, v) : vf{};
  T *out = (T*)a.out, *activated = (T*)a.activated;
  const T* before = (const T*)a.before;
  bool stream = a.stream && all == kSide;
  int64_t at = row * width + column;
  for (int64_t r = 0; r < rows; ++r, at += width, c += kSide) {
    vf y[kVectors], value[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      y[v] = load(c + v * W) + added[v];
      if (before) {
        vf slope;
        value[v] = activate<kind>(vector_of(before + at, all, v), &slope);
        y[v] *= slope;
      } else {
        y[v] = rounded<T>(y[v]);
        value[v] = activate<kind>(y[v]);
      }
    }
    if (out) put_row(out + at, y, all, stream);
    if (activated) put_row(activated + at, value, all, stream);
  }
}

template <class T>
void write_activated(const ActivatedLinear& a, const float* c, const float* bias, int64_t width, int64_t row,
                     int64_t column) {
  by_activation(a.act, [&](auto act) { write_kind<T, decltype(act)::kind>(a, c, bias, width, row, column); });
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
