// Cross entropy of logit rows. Forward reads a row once and keeps its logsumexp; backward reads it once more.
#include "token_terms.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int64_t kBlock = 2048;  // logits between two looks at the maximum: they stay in the first-level cache

template <class T>
BK_INLINE float logit(const T* row, int64_t i, float cap) {
  float z = load(row + i, 1)[0];
  return cap > 0 ? capped(z, cap) : z;
}

// A shift near max(z), sum(exp(z - shift)) and, where smoothing asks for it, sum(w * z).
struct RowSums {
  float shift, sum, weighted;
};

// exp(z - shift) of a block summed, and the block's maximum, in one pass. The lanes beyond the end count as -inf.
struct BlockSums {
  float max, sum;
};
template <class T, bool kCap>
BK_INLINE BlockSums block_sums(const T* p, int64_t n, float shift, float cap) {
  const vf minus_inf = splat(-__builtin_inff());
  vf maxima[2] = {minus_inf, minus_inf}, sums[2] = {};
  auto take = [&](vf z, int u) {
    if (kCap) z = capped(z, cap);
    maxima[u] = vmax(z, maxima[u]);
    sums[u] += vexp_softmax(z - shift);
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    prefetch_ahead(p + i);
    take(load(p + i), 0);
    take(load(p + i + W), 1);
  }
  for (; i + W <= n; i += W) take(load(p + i), 0);
  if (i < n) {
    vf z = load(p + i, n - i);
    if (kCap) z = capped(z, cap);
    for (int l = 0; l < W; ++l) z[l] = l < n - i ? z[l] : minus_inf[l];
    maxima[0] = vmax(z, maxima[0]);
    sums[0] += vexp_softmax(z - shift);
  }
  return {max(vmax(maxima[0], maxima[1])), sum(sums[0] + sums[1])};
}

// The shift of a block's exponentials is a logit that came before, so that one pass is enough; a block that exceeds it
// by much is summed again. It is never above the maximum, so the sum cannot vanish.
template <class T, bool kCap>
BK_INLINE RowSums row_sums(const T* row, const CrossEntropy& a, bool smooth) {
  constexpr float kMuch = 8.0f;
  const float minus_inf = -__builtin_inff();
  float running = minus_inf, total = 0.0f;
  vf weighted = {};
  for (int64_t start = 0; start < a.vocabulary; start += kBlock) {
    int64_t n = a.vocabulary - start < kBlock ? a.vocabulary - start : kBlock;
    const T* p = row + start;
    if (running == minus_inf) {  // nothing seen yet: the first logits tell as well as any, unless they are masked
      vf z = n < W ? load_or(p, n, minus_inf) : load(p);
      running = max(kCap ? capped(z, a.softcap) : z);
      if (running == minus_inf) running = block_sums<T, kCap>(p, n, 0.0f, a.softcap).max;
    }
    BlockSums block = block_sums<T, kCap>(p, n, running == minus_inf ? 0.0f : running, a.softcap);
    if (block.max > running + kMuch) {
      total *= vexp(splat(running - block.max))[0];
      running = block.max;
      block = block_sums<T, kCap>(p, n, running, a.softcap);
    }
    total += block.sum;
    if (smooth) {
      auto take = [&](vf z, vf w) { weighted += (kCap ? capped(z, a.softcap) : z) * w; };
      int64_t i = 0;
      for (; i + W <= n; i += W) take(load(p + i), a.weight ? load(a.weight + start + i) : splat(1.0f));
      if (i < n) {
        vf w = a.weight ? load(a.weight + start + i, n - i) : splat(1.0f);
        for (int l = 0; l < W; ++l) w[l] = l < n - i ? w[l] : 0.0f;
        take(load(p + i, n - i), w);
      }
    }
  }
  return {running, total, sum(weighted)};
}

template <class T>
BK_INLINE RowSums row_sums(const T* row, const CrossEntropy& a, bool smooth) {
  return a.softcap > 0 ? row_sums<T, true>(row, a, smooth) : row_sums<T, false>(row, a, smooth);
}

// The first class of the largest logit; NaN counts as larger than all, as in torch.
template <class T>
int64_t largest(const T* row, const CrossEntropy& a) {
  const float minus_inf = -__builtin_inff();
  constexpr int64_t kLook = 8 * W;
  int64_t best_index = 0;
  float best = minus_inf;
  auto look = [&](int64_t i) {  // true where nothing can be larger
    float z = logit(row, i, a.softcap);
    if (z > best || z != z) best = z, best_index = i;
    return z != z;
  };
  int64_t i = 0;
  for (; i + kLook <= a.vocabulary; i += kLook) {
    vf most = splat(minus_inf), unordered = {};
    for (int64_t v = 0; v < kLook; v += W) {
      vf z = load(row + i + v);
      most = vmax(z, most), unordered += z - z;  // 0, or NaN of NaN and of infinities
    }
    float m = max(most);
    if (a.softcap > 0) m = capped(splat(m), a.softcap)[0];
    float odd = sum(unordered);
    if (!(m > best) && odd == odd) continue;
    for (int64_t l = 0; l < kLook; ++l)
      if (look(i + l)) return best_index;
  }
  for (; i < a.vocabulary; ++i)
    if (look(i)) return best_index;
  return best_index;
}

template <class T>
void forward(const CrossEntropy& a, int64_t begin, int64_t end) {
  float smoothing = a.label_smoothing;
  for (int64_t r = begin; r < end; ++r) {
    const T* row = (const T*)a.logits.data + r * a.logits.stride;
    int64_t y = a.target[r];
    if (y == a.ignore_index) {
      a.loss[r] = a.lse[r] = a.divisor[r] = 0.0f;
      if (a.predicted) a.predicted[r] = -1;
      continue;
    }
    RowSums s = row_sums(row, a, smoothing > 0);
    if (a.predicted) a.predicted[r] = largest(row, a);
    float lse = s.shift + __builtin_logf(s.sum);
    float nll = lse - logit(row, y, a.softcap);
    float w = a.weight ? a.weight[y] : 1.0f;
    float loss = token_terms(a, nll, -__builtin_expm1f(-nll), lse, w, s.weighted).loss;
    a.lse[r] = lse;
    a.divisor[r] = w;
    a.loss[r] = a.token_weight ? loss * a.token_weight[r] : loss;
  }
}

// dz_j = alpha exp(z_j - shift) - beta w_j, with one value a row each; then through the softcap's slope.
template <class T, bool kCap, bool kSmooth>
void gradient_row(const T* row, T* out, const CrossEntropy& a, float shift, float alpha, float beta) {
  auto one = [&](vf x, vf w) {
    vf z = kCap ? capped(x, a.softcap) : x;
    vf d = vexp_softmax(z - shift) * alpha;
    if (kSmooth) d -= w * beta;
    if (kCap) d *= 1.0f - (z * (1.0f / a.softcap)) * (z * (1.0f / a.softcap));
    return d;
  };
  auto weight = [&](int64_t i) { return kSmooth && a.weight ? load(a.weight + i) : splat(1.0f); };
  int64_t i = 0;
  if (a.stream) {
    for (; i + 2 * W <= a.vocabulary; i += 2 * W) {
      prefetch_ahead(row + i);
      stream2(out + i, one(load(row + i), weight(i)), one(load(row + i + W), weight(i + W)));
    }
  }
  for (; i + W <= a.vocabulary; i += W) store(out + i, one(load(row + i), weight(i)));
  if (i < a.vocabulary) {
    int64_t n = a.vocabulary - i;
    store(out + i, one(load(row + i, n), kSmooth && a.weight ? load(a.weight + i, n) : splat(1.0f)), n);
  }
}

template <class T>
void backward(const CrossEntropy& a, int64_t begin, int64_t end) {
  float smoothing = a.label_smoothing;
  for (int64_t r = begin; r < end; ++r) {
    const T* row = (const T*)a.logits.data + r * a.logits.stride;
    T* out = (T*)a.out + r * a.vocabulary;
    int64_t y = a.target[r];
    if (y == a.ignore_index) {
      __builtin_memset(out, 0, a.vocabulary * sizeof(T));
      continue;
    }
    float g = a.grad[r * a.grad_stride] * a.grad_scale * (a.token_weight ? a.token_weight[r] : 1.0f);
    float lse = a.lse[r], w = a.weight ? a.weight[y] : 1.0f;
    float z = logit(row, y, a.softcap), nll = lse - z;
    // p = exp(z - shift) * scale. In float32 the rounding of lse would show in the gradient, so the sum is made again.
    float shift = lse, scale = 1.0f;
    if (sizeof(T) == sizeof(float)) {
      RowSums s = row_sums(row, a, false);
      shift = s.shift, scale = 1.0f / s.sum;
      nll = (shift - z) + __builtin_logf(s.sum);
    }
    float weighted = a.focal_gamma > 0 && smoothing > 0 ? row_sums(row, a, true).weighted : 0.0f;
    TokenTerms t = token_terms(a, nll, -__builtin_expm1f(-nll), lse, w, weighted);
    auto gradient = a.softcap > 0 ? (smoothing > 0 ? gradient_row<T, true, true> : gradient_row<T, true, false>)
                                  : (smoothing > 0 ? gradient_row<T, false, true> : gradient_row<T, false, false>);
    gradient(row, out, a, shift, g * t.alpha * scale, g * t.beta);
    float slope = a.softcap > 0 ? 1.0f - (z / a.softcap) * (z / a.softcap) : 1.0f;
    float d = g * slope * (t.pulled - t.beta * w);
    store(out + y, splat(d), 1);
  }
  if (a.stream) fence();
}

}  // namespace

void cross_entropy_fwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}

void cross_entropy_bwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
