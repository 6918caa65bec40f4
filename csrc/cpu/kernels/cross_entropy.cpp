// Cross entropy of logit rows. Forward reads a row once and keeps its logsumexp; backward reads it once more.
#include <bigkernels/math.h>

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // logits converted at a time: they stay in the first-level cache

BK_INLINE vf capped(vf x, float cap) { return vtanh(x * (1.0f / cap)) * cap; }
BK_INLINE float capped(float x, float cap) { return capped(splat(x), cap)[0]; }

template <class T>
BK_INLINE float logit(const T* row, int64_t i, float cap) {
  float z = load(row + i, 1)[0];
  return cap > 0 ? capped(z, cap) : z;
}

// max(z), sum(exp(z - max)) and, where smoothing asks for it, sum(w * z).
struct RowSums {
  float max, sum, weighted;
};

template <class T, bool kCap>
BK_INLINE RowSums row_sums(const T* row, const CrossEntropy& a, bool smooth) {
  alignas(64) float z[kBlock];
  const float minus_inf = -__builtin_inff();
  float running = minus_inf;
  vf sums[2] = {}, weighted = {};
  for (int64_t start = 0; start < a.vocabulary; start += kBlock) {
    int64_t n = a.vocabulary - start < kBlock ? a.vocabulary - start : kBlock;
    const T* p = row + start;
    vf maxima[2] = {splat(minus_inf), splat(minus_inf)};
    auto take = [&](int64_t i, vf v, int u) {
      if (kCap) v = capped(v, a.softcap);
      maxima[u] = vmax(v, maxima[u]);
      store(z + i, v);
    };
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) take(i, load(p + i), 0), take(i + W, load(p + i + W), 1);
    for (; i + W <= n; i += W) take(i, load(p + i), 0);
    if (i < n) {
      // The lanes beyond add nothing: -inf. (tanh(-inf) is -1, so they are set after the cap.)
      vf v = load(p + i, n - i);
      if (kCap) v = capped(v, a.softcap);
      for (int l = 0; l < W; ++l) v[l] = l < n - i ? v[l] : minus_inf;
      maxima[0] = vmax(v, maxima[0]);
      store(z + i, v);
    }
    float top = max(vmax(maxima[0], maxima[1]));
    if (top > running) {
      float shrink = vexp(splat(running - top))[0];
      sums[0] *= shrink;
      sums[1] *= shrink;
      running = top;
    }
    float shift = running == minus_inf ? 0.0f : running;  // a masked block: every exponential is 0
    int64_t whole = (n + W - 1) / W * W;
    for (i = 0; i + 2 * W <= whole; i += 2 * W) {
      sums[0] += vexp_nonpositive(load(z + i) - shift);
      sums[1] += vexp_nonpositive(load(z + i + W) - shift);
    }
    if (i < whole) sums[0] += vexp_nonpositive(load(z + i) - shift);
    if (smooth) {
      for (i = 0; i + W <= n; i += W) weighted += load(z + i) * (a.weight ? load(a.weight + start + i) : splat(1.0f));
      for (; i < n; ++i) weighted[0] += z[i] * (a.weight ? a.weight[start + i] : 1.0f);
    }
  }
  return {running, sum(sums[0] + sums[1]), sum(weighted)};
}

template <class T>
BK_INLINE RowSums row_sums(const T* row, const CrossEntropy& a, bool smooth) {
  return a.softcap > 0 ? row_sums<T, true>(row, a, smooth) : row_sums<T, false>(row, a, smooth);
}

template <class T>
void forward(const CrossEntropy& a, int64_t begin, int64_t end) {
  float smoothing = a.label_smoothing;
  for (int64_t r = begin; r < end; ++r) {
    const T* row = (const T*)a.logits.data + r * a.logits.stride;
    int64_t y = a.target[r];
    if (y == a.ignore_index) {
      a.loss[r] = a.lse[r] = a.divisor[r] = 0.0f;
      continue;
    }
    RowSums s = row_sums(row, a, smoothing > 0);
    float lse = s.max + __builtin_logf(s.sum);
    float nll = lse - logit(row, y, a.softcap);
    float w = a.weight ? a.weight[y] : 1.0f;
    float ce = (1.0f - smoothing) * w * nll;
    if (smoothing > 0) ce += smoothing / (float)a.vocabulary * (a.weight_sum * lse - s.weighted);
    if (a.focal_gamma > 0) ce *= __builtin_powf(-__builtin_expm1f(-nll), a.focal_gamma);
    if (a.z_loss > 0) ce += a.z_loss * lse * lse;
    a.lse[r] = lse;
    a.divisor[r] = w;
    a.loss[r] = a.token_weight ? ce * a.token_weight[r] : ce;
  }
}

// dz_j = alpha p_j - beta w_j - kappa [j = y], with one value a row each; then through the softcap's slope.
template <class T, bool kCap>
BK_INLINE void gradient_row(const T* row, T* out, const CrossEntropy& a, float lse, float alpha, float beta, bool stream) {
  auto one = [&](vf x, vf w) {
    vf z = kCap ? capped(x, a.softcap) : x;
    vf d = vexp(z - lse) * alpha - w * beta;
    if (kCap) d *= 1.0f - (z * (1.0f / a.softcap)) * (z * (1.0f / a.softcap));
    return d;
  };
  auto weight = [&](int64_t i) { return beta != 0 && a.weight ? load(a.weight + i) : splat(1.0f); };
  int64_t i = 0;
  if (stream)
    for (; i + 2 * W <= a.vocabulary; i += 2 * W)
      stream2(out + i, one(load(row + i), weight(i)), one(load(row + i + W), weight(i + W)));
  for (; i + W <= a.vocabulary; i += W) store(out + i, one(load(row + i), weight(i)));
  if (i < a.vocabulary) {
    int64_t n = a.vocabulary - i;
    store(out + i, one(load(row + i, n), beta != 0 && a.weight ? load(a.weight + i, n) : splat(1.0f)), n);
  }
}

template <class T>
void backward(const CrossEntropy& a, int64_t begin, int64_t end) {
  float smoothing = a.label_smoothing, share = smoothing / (float)a.vocabulary;
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
    float z = logit(row, y, a.softcap);
    float nll = lse - z, missing = -__builtin_expm1f(-nll);  // 1 - p[y], with its precision where p[y] is near 1
    float kappa = (1.0f - smoothing) * w, beta = share, alpha = kappa + share * a.weight_sum;
    if (a.focal_gamma > 0) {
      float ce = kappa * nll;
      if (smoothing > 0) ce += share * (a.weight_sum * lse - row_sums(row, a, true).weighted);
      float focal = __builtin_powf(missing, a.focal_gamma);
      float pull = missing > 0 ? ce * a.focal_gamma * focal / missing * (1.0f - missing) : 0.0f;
      kappa = kappa * focal + pull;
      alpha = alpha * focal + pull;
      beta *= focal;
    }
    if (a.z_loss > 0) alpha += 2.0f * a.z_loss * lse;
    if (a.softcap > 0) {
      gradient_row<T, true>(row, out, a, lse, g * alpha, g * beta, a.stream);
    } else {
      gradient_row<T, false>(row, out, a, lse, g * alpha, g * beta, a.stream);
    }
    float slope = a.softcap > 0 ? 1.0f - (z / a.softcap) * (z / a.softcap) : 1.0f;
    // alpha p - kappa, written so that a confident token keeps its digits.
    float d = g * slope * ((alpha - kappa) - alpha * missing - beta * w);
    store(out + y, splat(d), 1);
  }
  if (a.stream) fence();
}

}  // namespace

void cross_entropy_fwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case Type::f32: return forward<float>(a, begin, end);
    case Type::bf16: return forward<bf16>(a, begin, end);
    case Type::f16: return forward<f16>(a, begin, end);
  }
}

void cross_entropy_bwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case Type::f32: return backward<float>(a, begin, end);
    case Type::bf16: return backward<bf16>(a, begin, end);
    case Type::f16: return backward<f16>(a, begin, end);
  }
}

}  // namespace BK_ISA
}  // namespace bigkernels
