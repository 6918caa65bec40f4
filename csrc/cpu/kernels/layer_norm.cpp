// LayerNorm of rows: both moments in one pass, about a first guess of the mean.
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
BK_INLINE vf get_or(const float* p, int64_t j, int64_t n, float missing) { return p ? get(p + j, n) : splat(missing); }

// sum(x - guess) and sum((x - guess)^2); with a residual, of x + residual rounded to T, which is kept in `total`.
struct Moments {
  float first, second;
};
template <class T, bool kResidual>
BK_INLINE Moments moments(const T* x, const T* residual, T* total, float guess, int64_t d) {
  vf one[4] = {}, two[4] = {};
  auto take = [&](int64_t i, int u) {
    vf v = load(x + i);
    if (kResidual) {
      v = rounded<T>(v + load(residual + i));
      store(total + i, v);
    }
    v -= guess;
    one[u] += v;
    two[u] += v * v;
  };
  int64_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) take(i + u * W, u);
  }
  for (; i + W <= d; i += W) take(i, 0);
  if (i < d) {
    int64_t n = d - i;
    vf v = kResidual ? rounded<T>(load(x + i, n) + load(residual + i, n)) : load(x + i, n);
    if (kResidual) store(total + i, v, n);
    for (int l = 0; l < W; ++l) v[l] = l < n ? v[l] - guess : 0.0f;
    one[1] += v;
    two[1] += v * v;
  }
  return {sum((one[0] + one[1]) + (one[2] + one[3])), sum((two[0] + two[1]) + (two[2] + two[3]))};
}

// The same about zero, for rows whose pairs one instruction sums.
template <class T>
BK_INLINE Moments moments_of_pairs(const T* x, int64_t d) {
  T ones[2 * W];
  for (int l = 0; l < 2 * W; ++l) store(ones + l, splat(1.0f), 1);
  vf one[2] = {}, two[2] = {};
  int64_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W) {
    one[0] = add_products(one[0], x + i, ones);
    two[0] = add_products(two[0], x + i, x + i);
    one[1] = add_products(one[1], x + i + 2 * W, ones);
    two[1] = add_products(two[1], x + i + 2 * W, x + i + 2 * W);
  }
  each(d - i, [&](int64_t j, int64_t n) {
    vf v = get(x + i + j, n);
    one[0] += v;
    two[0] += v * v;
  });
  return {sum(one[0] + one[1]), sum(two[0] + two[1])};
}

// The mean of a row's first elements: near enough to the row's mean that little cancels in the variance.
template <class T>
BK_INLINE float guess_mean(const T* x, const T* residual, int64_t d) {
  int64_t n = d < W ? d : W;
  vf v = load(x, n);
  if (residual) v += load(residual, n);
  return sum(v) / (float)n;
}

template <class T>
void forward(const LayerNorm& a, int64_t begin, int64_t end) {
  float inv_d = 1.0f / (float)a.d;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = (const T*)a.x.data + r * a.x.stride;
    const T* next = x + a.x.stride;
    const T* residual = a.residual.data ? (const T*)a.residual.data + r * a.residual.stride : nullptr;
    T* total = (T*)a.total + (residual ? r * a.d : 0);
    T* y = (T*)a.out + r * a.d;
    bool pairs = kPairs<T> && !residual;
    float mean = pairs ? 0.0f : guess_mean(x, residual, a.d);
    Moments m = pairs      ? moments_of_pairs(x, a.d)
                : residual ? moments<T, true>(x, residual, total, mean, a.d)
                           : moments<T, false>(x, nullptr, nullptr, mean, a.d);
    if (residual) x = total;
    float left = m.first * inv_d, variance = m.second * inv_d - left * left;
    if (!(left * left <= variance)) {  // a poor guess cancelled digits: once more about the mean itself
      mean += left;
      m = moments<T, false>(x, nullptr, nullptr, mean, a.d);
      left = m.first * inv_d, variance = m.second * inv_d - left * left;
    }
    float rstd = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + a.eps);
    if (a.rstd) a.mean[r] = mean + left, a.rstd[r] = rstd;
    // 16-bit rows are never so far from zero that x * rstd would lose digits to the mean; float32 rows are centred
    // first, with what the mean's rounding left over.
    constexpr bool kCentre = sizeof(T) == sizeof(float);
    float shift = kCentre ? -left * rstd : -(mean + left) * rstd;
    auto one = [&](int64_t j, int64_t n) {
      vf v = kCentre ? (get(x + j, n) - mean) * rstd + shift : get(x + j, n) * rstd + shift;
      return v * get_or(a.weight, j, n, 1.0f) + get_or(a.bias, j, n, 0.0f);
    };
    int64_t i = 0;
    if (a.stream) {
      for (; i + 2 * W <= a.d; i += 2 * W) {
        prefetch(next + i);
        stream2(y + i, one(i, W), one(i + W, W));
      }
    }
    for (; i + W <= a.d; i += W) store(y + i, one(i, W));
    if (i < a.d) store(y + i, one(i, a.d - i), a.d - i);
  }
  if (a.stream) fence();
}

// With xhat = (x - mean) * rstd and g = grad * weight: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),
// dweight = sum grad * xhat, dbias = sum grad.
template <class T>
void backward(const LayerNorm& a, int64_t begin, int64_t end, int64_t block) {
  float* dweight = a.dweight.recent ? a.dweight.recent + block * a.d : nullptr;
  float* dbias = a.dbias.recent ? a.dbias.recent + block * a.d : nullptr;
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
      g *= get_or(a.weight, j, n, 1.0f);
      sum_g += g;
      sum_gx += g * xhat;
    });
    // dx = g * rstd + x * slope + shift
    float mean_gx = sum(sum_gx) / (float)a.d * rstd;
    float slope = -mean_gx * rstd, shift = mean_gx * mean * rstd - sum(sum_g) / (float)a.d * rstd;
    auto one = [&](int64_t j, int64_t n) {
      vf v = get(grad + j, n) * get_or(a.weight, j, n, 1.0f) * rstd +
             ((get(x + j, n) - mean) * slope + (shift + slope * mean));
      return grad_total ? v + get(grad_total + j, n) : v;
    };
    int64_t i = 0;
    if (a.stream) {
      for (; i + 2 * W <= a.d; i += 2 * W) {
        prefetch(x + a.x.stride + i);
        prefetch(grad + a.grad.stride + i);
        stream2(dx + i, one(i, W), one(i + W, W));
      }
    }
    for (; i + W <= a.d; i += W) store(dx + i, one(i, W));
    if (i < a.d) store(dx + i, one(i, a.d - i), a.d - i);
    if ((r - begin) % kRowsAtOnce == kRowsAtOnce - 1 || r == end - 1) {
      settle(a.dweight, block, a.d);
      settle(a.dbias, block, a.d);
    }
  }
  if (a.stream) fence();
}

}  // namespace

void layer_norm_fwd(const LayerNorm& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}

void layer_norm_bwd(const LayerNorm& a, int64_t begin, int64_t end, int64_t block) {
  by_type(a.type, [&](auto t) { backward<decltype(t)>(a, begin, end, block); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
