// New queries, keys and values of a program: each head is normed and rotated in float32; queries go to their value,
// keys and values to the cache.
#include <bigkernels/program.h>

#include "cache_codes.h"
#include "rotate.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int64_t kMostElements = 2048;  // of a head

BK_INLINE vf elements(const Vector& x, int64_t i, int64_t n) {
  return by_type(x.type, [&](auto t) __attribute__((always_inline)) {
    auto from = (const decltype(t)*)x.data + i;
    return n >= W ? load(from) : load(from, n);
  });
}

// f(i, n) for vectors of a head: elements [i, i + n), n <= W.
template <class F>
BK_INLINE void each_vector(int64_t d, F f) {
  for (int64_t i = 0; i < d; i += W) f(i, d - i < W ? d - i : W);
}
BK_INLINE vf some(const float* p, int64_t n) { return n == W ? load(p) : load(p, n); }

void norm_head(const NormOf& norm, const float* x, int64_t d, float* out) {
  const bool centered = norm.kind == NormKind::layer;
  float mean = 0;
  if (centered) {
    vf total{};
    each_vector(d, [&](int64_t i, int64_t n) { total += some(x + i, n); });
    mean = sum(total) / (float)d;
  }
  vf squares{};
  each_vector(d, [&](int64_t i, int64_t n) {
    vf v = some(x + i, n) - mean;
    if (n < W)
      for (int64_t j = n; j < W; ++j) v[j] = 0;
    squares += v * v;
  });
  float by = 1.0f / __builtin_sqrtf(sum(squares) / (float)d + norm.eps);
  each_vector(d, [&](int64_t i, int64_t n) {
    vf v = (some(x + i, n) - mean) * by;
    if (norm.weight.data) v *= elements(norm.weight, i, n) + norm.offset;
    if (norm.bias.data) v += elements(norm.bias, i, n);
    n == W ? store(out + i, v) : store(out + i, v, n);
  });
}

template <class T>
BK_INLINE void put(const float* head, int64_t d, T* to) {
  int64_t i = 0;
  for (; i + W <= d; i += W) store(to + i, load(head + i));
  if (i < d) store(to + i, load(head + i, d - i), d - i);
}

// One head into the cache: its place in elements, and that of its scale.
BK_INLINE void put(const LayerCache& c, void* cache, float* scale, const float* head, int64_t d, int64_t at,
                   int64_t scale_at) {
  if (c.bits == 8) return quantize_head<float>(head, d, nullptr, 0, (int8_t*)cache + at, scale + scale_at);
  by_type(c.type, [&](auto t) { put(head, d, (decltype(t)*)cache + at); });
}

// Asked after a head was made and before it is stored: if the step was not past then, all that the head was made of was
// still what it was in the call, however late the thread stores it.
BK_INLINE bool is_past(const Progress* p) {
  if (!p) return false;
  __atomic_thread_fence(__ATOMIC_ACQUIRE);
  return __atomic_load_n(p->at, __ATOMIC_ACQUIRE) > p->step;
}

}  // namespace

void program_heads(const HeadsRecord& r, const Run& run, float* const* v, const int32_t* width, int64_t begin,
                   int64_t end, const Progress* progress) {
  TokenAngles turn;
  alignas(64) float head[kMostElements];
  Angles angles{};
  const AngleTable* table = r.angles >= 0 && r.rotary > 0 ? run.angles + r.angles : nullptr;
  if (table)
    angles = {table->cos, table->sin, 0, table->stride, 0, table->stride, r.rotary, table->type, r.interleaved != 0};
  for (int64_t row = begin; row < end; ++row) {
    int64_t batch = row / run.tokens, token = row % run.tokens;
    if (table) turn.read(angles, 0, table->by_row ? row : run.positions[row]);
    // A head, ready in a buffer: what others read must never be half done, not even when it is made again.
    auto ready = [&](const HeadsOf& of, int64_t h, const NormOf& norm) {
      const float* from = v[of.x] + row * width[of.x] + of.column[h];
      if (norm.kind == NormKind::none)
        put(from, r.d, head);
      else
        norm_head(norm, from, r.d, head);
      if (table) rotate(angles, turn, head, head, false);
    };
    float* out = v[r.out] + row * width[r.out];
    for (int64_t h = 0; h < r.q.count; ++h) {
      ready(r.q, h, r.q_norm);
      put(head, r.d, out + h * r.d);
    }
    if (r.k.count == 0) continue;
    const LayerCache& c = run.caches[r.layer];
    int64_t slot = c.held + token;
    for (int64_t h = 0; h < r.k.count; ++h) {
      ready(r.k, h, r.k_norm);
      if (is_past(progress)) return;
      put(c, c.k, c.k_scale, head, r.d, batch * c.k_batch + h * c.k_head + slot * c.k_token,
          batch * c.scale_batch + h * c.scale_head + slot);
    }
    for (int64_t h = 0; h < r.v.count; ++h) {
      const float* from = v[r.v.x] + row * width[r.v.x] + r.v.column[h];
      put(from, r.dv, head);
      if (is_past(progress)) return;
      put(c, c.v, c.v_scale, head, r.dv, batch * c.v_batch + h * c.v_head + slot * c.v_token,
          batch * c.scale_batch + h * c.scale_head + slot);
    }
  }
}

void program_turn(const TurnRecord& r, const Run& run, float* const* v, const int32_t* width, int64_t begin,
                  int64_t end) {
  TokenAngles turn;
  alignas(64) float head[kMostElements];
  Angles angles{};
  const AngleTable* table = r.angles >= 0 && r.rotary > 0 ? run.angles + r.angles : nullptr;
  if (table)
    angles = {table->cos, table->sin, 0, table->stride, 0, table->stride, r.rotary, table->type, r.interleaved != 0};
  for (int64_t row = begin; row < end; ++row) {
    if (table) turn.read(angles, 0, table->by_row ? row : run.positions[row]);
    const float* from = v[r.x.x] + row * width[r.x.x];
    float* out = v[r.out] + row * width[r.out];
    for (int64_t h = 0; h < r.x.count; ++h) {
      if (r.norm.kind == NormKind::none)
        put(from + r.x.column[h], r.d, head);
      else
        norm_head(r.norm, from + r.x.column[h], r.d, head);
      if (table) rotate(angles, turn, head, head, false);
      put(head, r.d, out + h * r.d);
    }
  }
}

}  // namespace BK_ISA
}  // namespace bigkernels
