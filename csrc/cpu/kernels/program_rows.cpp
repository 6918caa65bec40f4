// The row records of a step program: norms, sums, activations, and what comes after a product.
//
// Where a chunk ends depends on the number of threads, and results do not: each loop has its arithmetic once, for whole
// vectors and for the end of a row alike, so that the compiler cannot contract the two differently.
#include "program_rows.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

struct Moments {
  float mean, rstd;
};

BK_INLINE Moments moments(const float* x, int64_t d, NormKind kind, float eps) {
  Moments m{0, 1};
  if (kind == NormKind::none) return m;
  vf acc[4] = {};
  int64_t i = 0;
  if (kind == NormKind::layer) {
    for (; i + 4 * W <= d; i += 4 * W)
      for (int u = 0; u < 4; ++u) acc[u] += load(x + i + u * W);
    for (; i < d; i += W) acc[0] += part(x + i, d - i);
    m.mean = sum((acc[0] + acc[1]) + (acc[2] + acc[3])) / (float)d;
    for (vf& a : acc) a = vf{};
    i = 0;
  }
  for (; i + 4 * W <= d; i += 4 * W)
    for (int u = 0; u < 4; ++u) {
      vf v = load(x + i + u * W) - m.mean;
      acc[u] += v * v;
    }
  for (; i < d; i += W) {
    vf v = within(part(x + i, d - i) - m.mean, d - i);
    acc[0] += v * v;
  }
  m.rstd = 1.0f / __builtin_sqrtf(sum((acc[0] + acc[1]) + (acc[2] + acc[3])) / (float)d + eps);
  return m;
}

}  // namespace

void program_norm(const NormRecord& a, float* const* v, const int32_t* width, int64_t begin, int64_t end) {
  const int64_t all = width[a.x], d = a.size;
  for (int64_t g = begin * (all / d); g < end * (all / d); ++g) {
    const float* x = v[a.x] + g * d;
    const float* residual = a.residual >= 0 ? v[a.residual] + g * d : nullptr;
    float* out = v[a.out] + g * d;
    const Moments m = moments(x, d, a.norm.kind, a.norm.eps);
    for (int64_t i = 0; i < d; i += W) {
      const int64_t n = d - i;
      vf y = (part(x + i, n) - m.mean) * m.rstd;
      if (a.norm.weight.data) y *= part(a.norm.weight, i, n) + a.norm.offset;
      if (a.norm.bias.data) y += part(a.norm.bias, i, n);
      y *= a.scale;
      if (residual) y += part(residual + i, n) * a.residual_scale;
      put(out + i, y, n);
    }
  }
}

void program_combine(const CombineRecord& a, float* const* v, const int32_t* width, int64_t begin, int64_t end) {
  const int64_t d = width[a.out];
  while (begin < end) {
    const int64_t column = begin % d, here = d - column < end - begin ? d - column : end - begin;
    for (int64_t i = 0; i < here; i += W) {
      const int64_t n = here - i;
      vf y{};
      for (int t = 0; t < a.count; ++t) {
        vf term = part(v[a.x[t]] + begin + i, n) * a.scale[t];
        if (a.channel[t].data) term *= part(a.channel[t], column + i, n);
        y = t ? y + term : term;
      }
      put(v[a.out] + begin + i, y, n);
    }
    begin += here;
  }
}

void program_activate(const ActivateRecord& a, float* const* v, const int32_t* width, int64_t begin, int64_t end) {
  const int64_t d = a.width;
  const float limit = a.limit > 0 ? a.limit : __builtin_inff();
  while (begin < end) {
    const int64_t row = begin / d, column = begin % d, here = d - column < end - begin ? d - column : end - begin;
    const float* x = v[a.x] + row * width[a.x] + a.x_column + column;
    const float* up = a.up >= 0 ? v[a.up] + row * width[a.up] + a.up_column + column : nullptr;
    for (int64_t i = 0; i < here; i += W) {
      const int64_t n = here - i;
      vf y = activation(a.act, vmin(splat(limit), part(x + i, n)), a.alpha);
      if (up) y *= vmax(splat(-limit), vmin(splat(limit), part(up + i, n))) + a.up_offset;
      y *= a.scale;
      if (a.softcap > 0) y = vtanh(y * (1.0f / a.softcap)) * a.softcap;
      put(v[a.out] + begin + i, y, n);
    }
    begin += here;
  }
}

namespace {

// Rows lie apart, and a few lines of each come: too few for the machine's own prefetcher.
BK_INLINE void ask_for(const float* p, int64_t n, bool write) {
  for (int64_t i = 0; i < n; i += 16) write ? __builtin_prefetch(p + i, 1, 3) : __builtin_prefetch(p + i, 0, 3);
}

}  // namespace

void program_finish(const ProductRecord& a, int w, const float* y, const float* up, int64_t stride, int64_t m,
                    float* const* v, const int32_t* width, int64_t begin, int64_t end) {
  constexpr int64_t kAhead = 8;
  const int64_t all = width[a.out[w]], rows = end - begin;
  for (int64_t t = 0; t < m; ++t) {
    float* out = v[a.out[w]] + t * all + a.column[w] + begin;
    const int64_t residual_width = a.residual >= 0 ? width[a.residual] : 0;
    const float* residual = a.residual >= 0 ? v[a.residual] + t * residual_width + a.column[w] + begin : nullptr;
    if (t + kAhead < m) {
      ask_for(out + kAhead * all, rows, true);
      if (residual) ask_for(residual + kAhead * residual_width, rows, false);
    }
    auto row = [&](auto act) __attribute__((always_inline)) {
      for (int64_t i = 0; i < rows; i += W) {
        const int64_t n = rows - i;
        vf z = part(y + t * stride + i, n);
        if (a.bias[w].data) z += part(a.bias[w], begin + i, n);
        z = act(z);
        if (up) {
          vf u = part(up + t * stride + i, n);
          if (a.bias[1].data) u += part(a.bias[1], begin + i, n);
          z *= u;
        }
        z *= a.out_scale;
        if (residual) z += part(residual + i, n) * a.residual_scale;
        put(out + i, z, n);
      }
    };
    switch (a.act) {
      case Activation::identity: row([](vf z) __attribute__((always_inline)) { return z; }); break;
      case Activation::silu:
        row([](vf z) __attribute__((always_inline)) { return activate<Activation::silu>(z); });
        break;
      default: row([&](vf z) __attribute__((always_inline)) { return activation(a.act, z, 1.702f); });
    }
  }
}

}  // namespace BK_ISA
}  // namespace bigkernels
