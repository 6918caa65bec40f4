// LayerNorm of rows. The mean comes first and the variance from centred values, both from the first-level cache.
#include <bigkernels/vec.h>

namespace bigkernels {
namespace BK_ISA {
namespace {

// Calls f(j, n) for a row's vectors: n == W, a constant, for the whole ones and n < W for the last.
template <class F>
BK_INLINE void each(int64_t d, F f) {
  int64_t i = 0;
  for (; i + W <= d; i += W) f(i, (int64_t)W);
  if (i < d) f(i, d - i);
}
template <class T>
BK_INLINE vf get(const T* p, int64_t n) {
  return n == W ? load(p) : load(p, n);
}
template <class T>
BK_INLINE void put(T* p, vf v, int64_t n) {
  n == W ? store(p, v) : store(p, v, n);
}
// A missing weight reads as one, a missing bias as zero.
template <class P>
BK_INLINE vf get_or(const P* p, int64_t j, int64_t n, float missing) {
  return p ? get(p + j, n) : splat(missing);
}

template <class T, bool kResidual>
BK_INLINE float sum_row(const T* x, const T* residual, T* total, int64_t d) {
  vf acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      vf v = load(x + i + u * W);
      if (kResidual) {
        v = rounded<T>(v + load(residual + i + u * W));
        store(total + i + u * W, v);
      }
      acc[u] += v;
    }
  }
  for (; i < d; i += W) {
    int64_t n = d - i < W ? d - i : W;
    vf v = load(x + i, n);
    if (kResidual) {
      v = rounded<T>(v + load(residual + i, n));
      store(total + i, v, n);
    }
    acc[0] += v;
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// sum(x - mean) and sum((x - mean)^2). The first is what the rounding of the mean left over.
struct Moments {
  float first, second;
};
template <class T>
BK_INLINE Moments centred_moments(const T* x, float mean, int64_t d) {
  vf one[2] = {}, two[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      vf v = load(x + i + u * W) - mean;
      one[u & 1] += v;
      two[u] += v * v;
    }
  }
  for (; i < d; i += W) {
    vf v = (d - i < W ? load_or(x + i, d - i, mean) : load(x + i)) - mean;
    one[0] += v;
    two[0] += v * v;
  }
  return {sum(one[0] + one[1]), sum((two[0] + two[1]) + (two[2] + two[3]))};
}

template <class T, class Wt, class Bt>
void forward(const LayerNorm& a, int64_t begin, int64_t end) {
  const Wt* weight = (const Wt*)a.weight;
  const Bt* bias = (const Bt*)a.bias;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = (const T*)a.x.data + r * a.x.stride;
    T* y = (T*)a.out + r * a.d;
    float total;
    if (a.residual.data) {
      T* kept = (T*)a.total + r * a.d;
      total = sum_row<T, true>(x, (const T*)a.residual.data + r * a.residual.stride, kept, a.d);
      x = kept;
    } else {
      total = sum_row<T, false>(x, nullptr, nullptr, a.d);
    }
    float mean = total / (float)a.d;
    Moments m = centred_moments(x, mean, a.d);
    float left = m.first / (float)a.d;
    float rstd = 1.0f / __builtin_sqrtf(m.second / (float)a.d - left * left + a.eps);
    if (a.rstd) a.mean[r] = mean, a.rstd[r] = rstd;
    float shift = -left * rstd;
    auto one = [&](int64_t j, int64_t n) {
      return ((get(x + j, n) - mean) * rstd + shift) * get_or(weight, j, n, 1.0f) + get_or(bias, j, n, 0.0f);
    };
    int64_t i = 0;
    if (a.stream)
      for (; i + 2 * W <= a.d; i += 2 * W) stream2(y + i, one(i, W), one(i + W, W));
    for (; i + W <= a.d; i += W) store(y + i, one(i, W));
    if (i < a.d) store(y + i, one(i, a.d - i), a.d - i);
  }
  if (a.stream) fence();
}

// With xhat = (x - mean) * rstd and g = grad * weight: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),
// dweight = sum grad * xhat, dbias = sum grad.
template <class T, class Wt>
void backward(const LayerNorm& a, int64_t begin, int64_t end, int64_t block) {
  const Wt* weight = (const Wt*)a.weight;
  float* dweight = a.dweight ? a.dweight + block * a.d : nullptr;
  float* dbias = a.dbias ? a.dbias + block * a.d : nullptr;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = (const T*)a.x.data + r * a.x.stride;
    const T* grad = (const T*)a.grad.data + r * a.grad.stride;
    const T* grad_total = a.grad_total.data ? (const T*)a.grad_total.data + r * a.grad_total.stride : nullptr;
    T* dx = (T*)a.out + r * a.d;
    float mean = a.mean[r], rstd = a.rstd[r];

    vf sum_g = {}, sum_gx = {};
    each(a.d, [&](int64_t j, int64_t n) {
      vf g = get(grad + j, n), xhat = (get(x + j, n) - mean) * rstd;
      if (dbias) put(dbias + j, get(dbias + j, n) + g, n);
      if (dweight) put(dweight + j, get(dweight + j, n) + g * xhat, n);
      g *= get_or(weight, j, n, 1.0f);
      sum_g += g;
      sum_gx += g * xhat;
    });
    // dx = g * rstd + x * slope + shift
    float mean_gx = sum(sum_gx) / (float)a.d * rstd;
    float slope = -mean_gx * rstd, shift = mean_gx * mean * rstd - sum(sum_g) / (float)a.d * rstd;
    auto one = [&](int64_t j, int64_t n) {
      vf v = get(grad + j, n) * get_or(weight, j, n, 1.0f) * rstd + ((get(x + j, n) - mean) * slope + (shift + slope * mean));
      return grad_total ? v + get(grad_total + j, n) : v;
    };
    int64_t i = 0;
    if (a.stream)
      for (; i + 2 * W <= a.d; i += 2 * W) stream2(dx + i, one(i, W), one(i + W, W));
    for (; i + W <= a.d; i += W) store(dx + i, one(i, W));
    if (i < a.d) store(dx + i, one(i, a.d - i), a.d - i);
  }
  if (a.stream) fence();
}

template <class T>
void forward_of(const LayerNorm& a, int64_t begin, int64_t end) {
  bool w = a.weight_type == a.type, b = a.bias_type == a.type;
  if (w) {
    b ? forward<T, T, T>(a, begin, end) : forward<T, T, float>(a, begin, end);
  } else {
    b ? forward<T, float, T>(a, begin, end) : forward<T, float, float>(a, begin, end);
  }
}
template <class T>
void backward_of(const LayerNorm& a, int64_t begin, int64_t end, int64_t block) {
  a.weight_type == a.type ? backward<T, T>(a, begin, end, block) : backward<T, float>(a, begin, end, block);
}

}  // namespace

void layer_norm_fwd(const LayerNorm& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case Type::f32: return forward_of<float>(a, begin, end);
    case Type::bf16: return forward_of<bf16>(a, begin, end);
    case Type::f16: return forward_of<f16>(a, begin, end);
  }
}

void layer_norm_bwd(const LayerNorm& a, int64_t begin, int64_t end, int64_t block) {
  switch (a.type) {
    case Type::f32: return backward_of<float>(a, begin, end, block);
    case Type::bf16: return backward_of<bf16>(a, begin, end, block);
    case Type::f16: return backward_of<f16>(a, begin, end, block);
  }
}

}  // namespace BK_ISA
}  // namespace bigkernels
