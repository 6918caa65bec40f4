// RMSNorm of rows. A row is read twice, the second time from the first-level cache.
#include <bigkernels/vec.h>

namespace bigkernels {
namespace BK_ISA {
namespace {

BK_INLINE float rsqrt(float v) { return 1.0f / __builtin_sqrtf(v); }

// sum(x^2), four accumulators deep; with a residual, x + residual is rounded to T, kept in `total` and used instead.
template <class T, bool kResidual>
BK_INLINE float sum_of_squares(const T* x, const T* residual, T* total, int64_t d) {
  vf acc[4] = {};
  int64_t i = 0;
  if (kPairs<T> && !kResidual) {
    for (; i + 4 * W <= d; i += 4 * W) {
      acc[0] = add_products(acc[0], x + i, x + i);
      acc[1] = add_products(acc[1], x + i + 2 * W, x + i + 2 * W);
    }
  }
  for (; i + 4 * W <= d; i += 4 * W) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      vf v = load(x + i + u * W);
      if (kResidual) {
        v = rounded<T>(v + load(residual + i + u * W));
        store(total + i + u * W, v);
      }
      acc[u] += v * v;
    }
  }
  for (; i < d; i += W) {
    int64_t n = d - i < W ? d - i : W;
    vf v = load(x + i, n);
    if (kResidual) {
      v = rounded<T>(v + load(residual + i, n));
      store(total + i, v, n);
    }
    acc[0] += v * v;
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// `next`: the row that comes after, asked for while this one is written.
template <class T, bool kWeight>
BK_INLINE void scale_row(const T* x, const T* next, const float* weight, T* y, float scale, int64_t d, bool stream) {
  auto one = [&](vf v, vf w) { return kWeight ? v * scale * w : v * scale; };
  auto w = [&](int64_t i) { return kWeight ? load(weight + i) : vf{}; };
  int64_t i = 0;
  if (stream) {
    for (; i + 2 * W <= d; i += 2 * W) {
      prefetch(next + i);
      stream2(y + i, one(load(x + i), w(i)), one(load(x + i + W), w(i + W)));
    }
  }
  for (; i + W <= d; i += W) store(y + i, one(load(x + i), w(i)));
  if (i < d) store(y + i, one(load(x + i, d - i), kWeight ? load(weight + i, d - i) : vf{}), d - i);
}

template <class T, bool kWeight>
void forward(const RmsNorm& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = (const T*)a.x.data + r * a.x.stride;
    const T* next = x + a.x.stride;
    T* y = (T*)a.out + r * a.d;
    float squares;
    if (a.residual.data) {
      T* total = (T*)a.total + r * a.d;
      squares = sum_of_squares<T, true>(x, (const T*)a.residual.data + r * a.residual.stride, total, a.d);
      x = total;
    } else {
      squares = sum_of_squares<T, false>(x, nullptr, nullptr, a.d);
    }
    float rstd = rsqrt(squares / (float)a.d + a.eps);
    if (a.rstd) a.rstd[r] = rstd;
    scale_row<T, kWeight>(x, next, a.weight, y, rstd, a.d, a.stream);
  }
  if (a.stream) fence();
}

// With xhat = x * rstd and g = grad * weight: dx = rstd * (g - xhat * mean(g * xhat)), dweight = sum grad * xhat.
template <class T, bool kWeight>
void backward(const RmsNorm& a, int64_t begin, int64_t end, int64_t block) {
  float* dweight = kWeight ? a.dweight.recent + block * a.d : nullptr;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = (const T*)a.x.data + r * a.x.stride;
    const T* grad = (const T*)a.grad.data + r * a.grad.stride;
    const T* grad_total = a.grad_total.data ? (const T*)a.grad_total.data + r * a.grad_total.stride : nullptr;
    T* dx = (T*)a.out + r * a.d;
    float rstd = a.rstd[r];

    vf acc[2] = {};
    int64_t i = 0;
    for (; i + 2 * W <= a.d; i += 2 * W) {
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
        int64_t j = i + u * W;
        vf product = load(grad + j) * load(x + j);
        if (kWeight) {
          store(dweight + j, load(dweight + j) + product * rstd);
          product *= load(a.weight + j);
        }
        acc[u] += product;
      }
    }
    for (; i < a.d; i += W) {
      int64_t n = a.d - i < W ? a.d - i : W;
      vf product = load(grad + i, n) * load(x + i, n);
      if (kWeight) {
        store(dweight + i, load(dweight + i, n) + product * rstd, n);
        product *= load(a.weight + i, n);
      }
      acc[0] += product;
    }
    // The factor on x and not on xhat: rstd^3 * mean(g * x).
    float pull = sum(acc[0] + acc[1]) / (float)a.d * rstd * rstd * rstd;

    auto one = [&](int64_t j, int64_t n) {
      bool whole = n == W;
      vf g = whole ? load(grad + j) : load(grad + j, n);
      if (kWeight) g *= whole ? load(a.weight + j) : load(a.weight + j, n);
      vf v = g * rstd - (whole ? load(x + j) : load(x + j, n)) * pull;
      if (grad_total) v += whole ? load(grad_total + j) : load(grad_total + j, n);
      return v;
    };
    i = 0;
    if (a.stream) {
      for (; i + 2 * W <= a.d; i += 2 * W) {
        prefetch(x + a.x.stride + i);
        prefetch(grad + a.grad.stride + i);
        stream2(dx + i, one(i, W), one(i + W, W));
      }
    }
    for (; i + W <= a.d; i += W) store(dx + i, one(i, W));
    if (i < a.d) store(dx + i, one(i, a.d - i), a.d - i);
    if ((r - begin) % kRowsAtOnce == kRowsAtOnce - 1 || r == end - 1) settle(a.dweight, block, a.d);
  }
  if (a.stream) fence();
}

template <class T>
void forward_of(const RmsNorm& a, int64_t begin, int64_t end) {
  a.weight ? forward<T, true>(a, begin, end) : forward<T, false>(a, begin, end);
}
template <class T>
void backward_of(const RmsNorm& a, int64_t begin, int64_t end, int64_t block) {
  a.weight ? backward<T, true>(a, begin, end, block) : backward<T, false>(a, begin, end, block);
}

}  // namespace

void rms_norm_fwd(const RmsNorm& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto t) { forward_of<decltype(t)>(a, begin, end); });
}

void rms_norm_bwd(const RmsNorm& a, int64_t begin, int64_t end, int64_t block) {
  by_type(a.type, [&](auto t) { backward_of<decltype(t)>(a, begin, end, block); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
