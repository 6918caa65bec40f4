// Experts: where a router sends rows, and what comes after the products of an expert.
#include <bigkernels/program.h>

#include "program_rows.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

// 16 values or so, every second from p on.
BK_INLINE vf alternate(const float* p, int64_t n) {
  vf out{};
  for (int i = 0; i < W && i < n; ++i) out[i] = p[2 * i];
  return out;
}

BK_INLINE vf alternate(const Vector& v, int64_t i, int64_t n) {
  vf out{};
  by_type(v.type, [&](auto t) {
    for (int j = 0; j < W && j < n; ++j) out[j] = load_one((const decltype(t)*)v.data + i + 2 * j);
  });
  return out;
}

// The largest logit that comes after (value, index) in order; of equal ones the first. -1: none.
int64_t next_largest(const float* x, int64_t n, float value, int64_t index) {
  int64_t best = -1;
  for (int64_t i = 0; i < n; ++i) {
    const bool later = x[i] < value || (x[i] == value && i > index);
    if (later && (best < 0 || x[i] > x[best])) best = i;
  }
  return best;
}

}  // namespace

// Every number is written once: another thread may be reading what this one makes again.
void program_route(const ExpertsRecord& a, float* const* v, int64_t begin, int64_t end) {
  const int64_t n = a.experts;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = v[a.logits] + row * n;
    float *weights = v[a.weights] + row * a.top, *chosen = v[a.chosen] + row * a.top;
    float most = 0, kept = 0;
    auto probability = [&](float value) {
      return a.sigmoid ? vsigmoid(splat(value))[0] : vexp(splat(value - most))[0];
    };
    // The same numbers twice, so that none has to be kept.
    auto for_chosen = [&](auto f) {
      float value = __builtin_inff();
      int64_t index = -1;
      for (int64_t t = 0; t < a.top; ++t) {
        index = next_largest(x, n, value, index);
        if (index < 0) index = t;  // of numbers that are none
        value = x[index];
        if (t == 0) most = value;
        f(t, index, probability(value));
      }
    };
    for_chosen([&](int64_t, int64_t, float p) { kept += p; });
    float all = 1;
    if (a.renormalize) {
      all = kept;
    } else if (!a.sigmoid) {
      vf total{};
      for (int64_t i = 0; i < n; i += W) total += within(vexp(part(x + i, n - i) - most), n - i);
      all = sum(total);
    }
    float odd = 0;  // not a number, where a logit is none: no expert is right then
    for (int64_t i = 0; i < n; ++i) odd += x[i] != x[i] ? x[i] : 0.0f;
    const float factor = a.scale / all + odd;
    for_chosen([&](int64_t t, int64_t index, float p) { chosen[t] = (float)index, weights[t] = p * factor; });
  }
}

void program_units(const ExpertsRecord& a, int64_t expert, const float* y, const float* up, int64_t stride, int64_t m,
                   float* const* to, int64_t begin, int64_t end) {
  const float limit = a.limit > 0 ? a.limit : __builtin_inff();
  const bool in_turn = !a.up && !a.plain;
  const Vector none{}, gate_bias = a.gate_bias ? a.gate_bias[expert] : none;
  const Vector up_bias = a.up_bias ? a.up_bias[expert] : none;
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t i = 0; i < end - begin; i += W) {
      const int64_t n = end - begin - i, at = begin + i;
      const float *row = y + t * stride + (in_turn ? 2 : 1) * i, *other = in_turn ? row + 1 : up + t * stride + i;
      vf z = in_turn ? alternate(row, n) : part(row, n);
      if (gate_bias.data) z += in_turn ? alternate(gate_bias, 2 * at, n) : part(gate_bias, at, n);
      z = activation(a.act, vmin(splat(limit), z), a.alpha);
      if (!a.plain) {
        vf u = in_turn ? alternate(other, n) : part(other, n);
        if (in_turn && gate_bias.data) u += alternate(gate_bias, 2 * at + 1, n);
        if (up_bias.data) u += part(up_bias, at, n);
        z *= vmax(splat(-limit), vmin(splat(limit), u)) + a.up_offset;
      }
      put(to[t] + at, z, n);
    }
  }
}

void program_expert_sum(const ExpertsRecord& a, int64_t expert, const float* y, int64_t stride, int64_t m,
                        float* const* to, const float* weight, int64_t begin, int64_t end) {
  const Vector none{}, bias = a.down_bias ? a.down_bias[expert] : none;
  for (int64_t t = 0; t < m; ++t)
    for (int64_t i = 0; i < end - begin; i += W) {
      const int64_t n = end - begin - i;
      vf z = part(y + t * stride + i, n);
      if (bias.data) z += part(bias, begin + i, n);
      put(to[t] + i, part(to[t] + i, n) + z * weight[t], n);
    }
}

}  // namespace BK_ISA
}  // namespace bigkernels
