// Vector exp, tanh, sigmoid and the normal distribution. Coefficients: tools/fit_vector_math.py.
//
// Worst errors over a million values each, at every level (tests/test_native.py): exp 1.0 ulp, tanh 1.3 ulp,
// sigmoid 2.6 ulp, the normal distribution 6.8 ulp, its density 2.8 ulp.
#pragma once
#include "vec.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

// e^x = 2^n e^r with |r| <= ln2 / 2, for -150 <= x <= 150: rounds to 0 and to infinity at the ends. With ln2 in one
// part instead of two an operation is saved, which costs |x| * 3e-8 of the result.
template <bool kTwoParts = true>
BK_INLINE vf vexp_in_range(vf x) {
  const vf shifter = splat(0x1.8p23f);  // adding it rounds to an integer in the low bits
  vf shifted = x * 0x1.715476p0f + shifter;
  vf n = shifted - shifter;
  vf r = x - n * (kTwoParts ? 0x1.62e4p-1f : 0x1.62e43p-1f);  // the first part has trailing zeros: n times it is exact
  if (kTwoParts) r = r - n * 0x1.7f7d1cp-20f;
  vf p = splat(1.381461276e-03f);
  p = p * r + 8.368710056e-03f;
  p = p * r + 4.166838899e-02f;
  p = p * r + 1.666652113e-01f;
  p = p * r + 4.999999404e-01f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // In two factors, so that neither overflows before the product does.
  vi e = (vi)shifted - (vi)shifter, half = e >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((e - half + 127) << 23);
#endif
}

// The order of the operands matters: NaN is kept.
BK_INLINE vf vexp(vf x) { return vexp_in_range(vmax(splat(-150.0f), vmin(splat(150.0f), x))); }

// For x <= 0.
BK_INLINE vf vexp_nonpositive(vf x) { return vexp_in_range(vmax(splat(-150.0f), x)); }

// For a softmax, where x is at most about the logarithm of the sum, and large |x| give small terms.
BK_INLINE vf vexp_softmax(vf x) { return vexp_in_range<false>(vmax(splat(-120.0f), x)); }

// 2^x: 0 below -149 (-126 without AVX-512), infinity from 128 on, NaN kept. For softmax in base 2, where the logarithm
// of e is already in the scale of the scores: three operations fewer than vexp.
BK_INLINE vf vexp2(vf x) {
#if defined(__AVX512F__)
  vf f = (vf)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x); 0 for the infinities
#else
  vf clamped = vmin(splat(128.0f), vmax(splat(-126.0f), x));  // at 128 the exponent's bits are those of infinity
  const vf shifter = splat(0x1.8p23f);
  vf shifted = clamped - 0.5f + shifter;
  vf f = clamped - (shifted - shifter);  // in [0, 1]
#endif
  vf p = splat(1.877576675e-03f);
  p = p * f + 8.989340090e-03f;
  p = p * f + 5.582631825e-02f;
  p = p * f + 2.401536170e-01f;
  p = p * f + 6.931530732e-01f;
  p = p * f + 9.999999251e-01f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);  // 2^floor(x)
#else
  vf y = p * (vf)(((vi)shifted - (vi)shifter + 127) << 23);
  return select_less(x, splat(-126.0f), vf{}, y);
#endif
}

// 1 / (1 + e^-x), and e^-x / (1 + e^-x) with its own digits: 1 - sigmoid would lose them for large x.
BK_INLINE vf vsigmoid(vf x, vf* complement) {
  vf e = vexp_nonpositive(-vabs(x));
  vf large = reciprocal(e + 1.0f), small = e * large;
  *complement = select_less(x, vf{}, large, small);
  return select_less(x, vf{}, small, large);
}
BK_INLINE vf vsigmoid(vf x) {
  vf unused;
  return vsigmoid(x, &unused);
}

BK_INLINE vf vtanh(vf x) {
  vf a = vabs(x);
  vf s = x * x;
  vf p = splat(2.142962068e-03f);
  p = p * s - 8.177398704e-03f;
  p = p * s + 2.170070261e-02f;
  p = p * s - 5.394676328e-02f;
  p = p * s + 1.333320588e-01f;
  p = p * s - 3.333333135e-01f;
  vf small = p * s * x + x;
  vf bounded = vmin(splat(20.0f), a);
  vf large = 1.0f - 2.0f * reciprocal(vexp_in_range(bounded + bounded) + 1.0f);
  large = (vf)((vi)large | ((vi)x & (int32_t)0x80000000));
  return select_less(a, splat(0.625f), small, large);
}

// The normal distribution: returns Phi(x); density = e^(-x^2/2) / sqrt(2 pi).
BK_INLINE vf vnormal(vf x, vf* density) {
  vf a = vmin(splat(15.0f), vabs(x));  // beyond 14.2 the tail is zero in float32
  // x^2 = h^2 + (a - h)(a + h) with h short enough that h^2 is exact: the rounding of x^2 would be multiplied by x^2.
  vf h = (vf)((vi)a & (int32_t)0xfffff000);
  vf y = (a - h) * (a + h) * -0.5f;  // |y| < 0.1: four terms of its exponential
  vf e = vexp_nonpositive(h * h * -0.5f);
  e = e + e * y * (y * (y * (y * 0x1.555556p-5f + 0x1.555556p-3f) + 0.5f) + 1.0f);
  vf t = reciprocal(a * 0.25f + 1.0f);
  vf p = splat(1.657962985e-02f);
  p = p * t - 6.279202551e-02f;
  p = p * t + 5.165195465e-02f;
  p = p * t + 2.843650989e-02f;
  p = p * t + 1.271112636e-02f;
  p = p * t + 8.665736765e-02f;
  p = p * t + 7.199921459e-02f;
  p = p * t + 9.551577270e-02f;
  p = p * t + 9.949254990e-02f;
  p = p * t + 9.974790365e-02f;
  vf tail = e * p * t;
  *density = e * 0.3989422804f;
  return select_less(x, vf{}, tail, 1.0f - tail);
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
