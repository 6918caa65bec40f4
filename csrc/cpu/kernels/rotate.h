// The rotation of one head by its token's angles, from one storage type into another.
#pragma once
#include <bigkernels/vec.h>

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int64_t kMaxRotary = 1024;

template <class A>
BK_INLINE void angles(const void* from, int64_t at, int64_t rotary, float* to) {
  const A* p = (const A*)from + at;
  int64_t i = 0;
  for (; i + W <= rotary; i += W) store(to + i, load(p + i));
  if (i < rotary) store(to + i, load(p + i, rotary - i), rotary - i);
}

BK_INLINE void angles(Type type, const void* from, int64_t at, int64_t rotary, float* to) {
  by_type(type, [&](auto t) __attribute__((always_inline)) { angles<decltype(t)>(from, at, rotary, to); });
}

// One token's cos and sin, in float32.
struct TokenAngles {
  alignas(64) float cos[kMaxRotary], sin[kMaxRotary];

  void read(const Angles& a, int64_t batch, int64_t token) {
    angles(a.type, a.cos, batch * a.cos_batch + token * a.cos_token, a.rotary, cos);
    angles(a.type, a.sin, batch * a.sin_batch + token * a.sin_token, a.rotary, sin);
  }
};

// (a, b) -> (a cos - b sin, b cos + a sin); the inverse is the transpose. The halves' angles may differ.
template <class In, class Out>
BK_INLINE void rotate_halves(const In* in, Out* out, const float* cos, const float* sin, int64_t half, bool inverse) {
  int64_t i = 0;
  auto both = [&](auto get, auto put) {
    vf a = get(in + i), b = get(in + half + i);
    vf c1 = get(cos + i), c2 = get(cos + half + i), s1 = get(sin + i), s2 = get(sin + half + i);
    put(out + i, inverse ? a * c1 + b * s2 : a * c1 - b * s1);
    put(out + half + i, inverse ? b * c2 - a * s1 : b * c2 + a * s2);
  };
  for (; i + W <= half; i += W)
    both([](auto* p) __attribute__((always_inline)) { return load(p); },
         [](auto* p, vf v) __attribute__((always_inline)) { store(p, v); });
  if (i < half) {
    int64_t n = half - i;
    both([n](auto* p) __attribute__((always_inline)) { return load(p, n); },
         [n](auto* p, vf v) __attribute__((always_inline)) { store(p, v, n); });
  }
}

BK_INLINE vf swap_pairs(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_permute_ps((__m512)v, 0xb1);
#else
  vf r;
  for (int i = 0; i < W; ++i) r[i] = v[i ^ 1];
  return r;
#endif
}

template <class In, class Out>
BK_INLINE void rotate_pairs(const In* in, Out* out, const float* cos, const float* sin, int64_t rotary, bool inverse) {
  vf sign;
  for (int i = 0; i < W; ++i) sign[i] = i & 1 ? 1.0f : -1.0f;
  auto one = [&](vf x, vf c, vf s) {
    return inverse ? x * c - sign * swap_pairs(x * s) : x * c + sign * swap_pairs(x) * s;
  };
  int64_t i = 0;
  for (; i + W <= rotary; i += W) store(out + i, one(load(in + i), load(cos + i), load(sin + i)));
  if (i < rotary) {
    int64_t n = rotary - i;
    store(out + i, one(load(in + i, n), load(cos + i, n), load(sin + i, n)), n);
  }
}

// The first a.rotary elements of a head.
template <class In, class Out>
BK_INLINE void rotate(const Angles& a, const TokenAngles& t, const In* in, Out* out, bool inverse) {
  if (a.interleaved) {
    rotate_pairs(in, out, t.cos, t.sin, a.rotary, inverse);
  } else {
    rotate_halves(in, out, t.cos, t.sin, a.rotary / 2, inverse);
  }
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
