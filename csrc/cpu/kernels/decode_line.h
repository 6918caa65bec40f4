// A block of keys at one distance from each other that all rows see: scores, weights and sums for a few rows without a
// detour, which is what keeps up with the memory where one token reads a cache.
#pragma once
#include "decode_quarters.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

BK_INLINE bool any_above(vf x, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(x > bound)) != 0;
#else
  return max(x) > bound;
#endif
}

// A weight is the exponential of its score less a shift, which is an earlier maximum as long as no score exceeds it by
// more than this: then the sums so far seldom change.
constexpr float kSlack = 8;

// The products of one row and W keys. Steps of a row of q where they are known, else 0. It asks for the steps ahead
// that are its own among kTurns rows: all of them at once would stand in the way of the loads.
template <class C, int kSteps, int kTurn, int kTurns>
BK_INLINE vf line_products(const Left<C>* q, const Line& keys, int64_t from, int64_t d) {
  typedef Elements<C> E;
  typedef typename E::Vector V;
  constexpr int64_t step = E::kStep * sizeof(C);
  const char *k = keys.first + from * keys.by, *ahead = keys.ahead + from * keys.by;
  vf acc[W];
  if constexpr (kSteps > 0) {
    V left[kSteps];
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s) left[s] = read<V>(q + s * E::kStep);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j, k += keys.by, ahead += keys.by) {
      acc[j] = vf{};
#pragma GCC unroll 8
      for (int s = 0; s < kSteps; ++s) {
        if (s % kTurns == kTurn && s * step % kLine == 0) ask(ahead + s * step);
        acc[j] = E::multiply_add(acc[j], left[s], E::load(k + s * step));
      }
    }
  } else {
    for (int j = 0; j < W; ++j) acc[j] = vf{};
    int64_t e = 0;
    auto add = [&](auto get) __attribute__((always_inline)) {
      V left = read<V>(q + e);
      const char *at = k + e * sizeof(C), *next = ahead + e * sizeof(C);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j, at += keys.by, next += keys.by) {
        if (kTurn == 0 && (step >= kLine || e * sizeof(C) % kLine == 0)) ask(next);
        acc[j] = E::multiply_add(acc[j], left, get(at));
      }
    };
    for (; e + E::kStep <= d; e += E::kStep)
      add([](const char* p) __attribute__((always_inline)) { return E::load(p); });
    if (int64_t n = d - e; n > 0) add([n](const char* p) __attribute__((always_inline)) { return E::load(p, n); });
  }
  return sums(acc);
}

// R rows of weights times U steps of the values' elements; Last: less than a step, n elements.
template <class C, int R, int U, bool Last>
BK_INLINE void line_sums(const Layout& n, const Left<C>* w, const Line& values, int64_t from, int64_t elements,
                         float* acc, const float* factor, bool ahead) {
  typedef Elements<C> E;
  constexpr int V = U * E::kVectors;
  vf total[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) total[r][i] = load(acc + r * n.acc_width + i * W) * factor[r];
  const char *v = values.first + from * sizeof(C), *next = values.ahead + from * sizeof(C);
  for (int64_t t = 0; t < kKeys; t += E::kKeysAtOnce) {
    const char* keys[2] = {v, v + values.by};
    if (ahead)
#pragma GCC unroll 2
      for (int i = 0; i < E::kKeysAtOnce; ++i)
#pragma GCC unroll 8
        for (int64_t b = 0; b < U * E::kStep * (int64_t)sizeof(C); b += kLine) ask(next + i * values.by + b);
    v += E::kKeysAtOnce * values.by, next += E::kKeysAtOnce * values.by;
    typename E::Vector x[V];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
      E::values(keys, u * E::kStep * sizeof(C), x + u * E::kVectors,
                [elements](const char* at)
                    __attribute__((always_inline)) { return Last ? E::load(at, elements) : E::load(at); });
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      auto by = E::weight(w + r * kKeys + t);
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) total[r][i] = E::multiply_add(total[r][i], by, x[i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) store(acc + r * n.acc_width + i * W, total[r][i]);
}

template <class C, int R, int U>
BK_INLINE void line_columns(const Layout& n, const Left<C>* w, const Line& values, int64_t from, int64_t dv, float* acc,
                            const float* factor, bool ahead) {
  constexpr int64_t step = Elements<C>::kStep;
  for (; from + U * step <= dv; from += U * step)
    line_sums<C, R, U, false>(n, w, values, from, 0, acc + from, factor, ahead);
  if constexpr (U > 1) {
    line_columns<C, R, U / 2>(n, w, values, from, dv, acc, factor, ahead);
  } else if (from < dv) {
    line_sums<C, R, 1, true>(n, w, values, from, dv - from, acc + from, factor, ahead);
  }
}

template <int R, class F>
BK_INLINE void for_turns(F f) {
  if constexpr (R > 1) for_turns<R - 1>(f);
  f(Number<R - 1>());
}

// The weights of a row's scores, in their place, and by what its sums so far count.
template <int N>
BK_INLINE void line_weights(const State& state, int64_t row, vf* x, float* factor) {
  vf most = splat(-kInfinity);
  for (int i = 0; i < N; ++i) most = vmax(x[i], most);
  float* highest = state.most + row;
  vf total = load(state.total + row * W);
  *factor = 1;
  if (any_above(most, *highest + kSlack)) {
    float now = max(most);
    *factor = vexp_nonpositive(splat(*highest - now))[0];
    total = total * *factor;
    *highest = now;
  }
  float shift = *highest > -kInfinity ? *highest : 0;
  for (int i = 0; i < N; ++i) x[i] = vexp_softmax(x[i] - shift), total += x[i];
  store(state.total + row * W, total);
}

// Weights of R rows from their products with kKeys keys.
template <class C, int R>
BK_INLINE void line_scores(const State& state, int64_t row, const float* s, const Line& keys, const Line& values,
                           float scale, Left<C>* w, float* factor) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    vf p[kKeys / W];
    for (int i = 0; i < kKeys / W; ++i) {
      p[i] = load(s + r * kKeys + i * W) * scale;
      if (keys.scale) p[i] *= load(keys.scale + i * W);
    }
    line_weights<kKeys / W>(state, row + r, p, factor + r);
    for (int i = 0; i < kKeys / W; ++i) {
      if (values.scale) p[i] = p[i] * load(values.scale + i * W);
      store(w + r * kKeys + i * W, p[i]);
    }
  }
}

// kDense: elements and keys follow each other without gaps, which makes all addresses but a few constants.
template <class C, int R, int kSteps, bool kDense>
void line_rows(const Layout& n, const Left<C>* q, const State& state, int64_t row, Line keys, Line values,
               int64_t count, int64_t d, int64_t dv, float scale, bool ahead) {
  if constexpr (kDense) {
    d = dv = kSteps * Elements<C>::kStep;
    keys.by = values.by = d * sizeof(C);
  }
  alignas(64) float s[R * kKeys];
  alignas(64) Left<C> w[R * kKeys];
  float factor[R];
  auto blocks = [&](auto products) __attribute__((always_inline)) {
    for (int64_t key = 0; key < count; key += kKeys, keys.move(kKeys), values.move(kKeys)) {
      for (int64_t t = 0; t < kKeys; t += W) products(t);
      line_scores<C, R>(state, row, s, keys, values, scale, w, factor);
      constexpr int V = W == 16 ? (R >= 3 ? 4 : 8) : W == 8 ? (R == 2 ? 4 : 8) : 8;  // vectors of sums a row
      line_columns<C, R, V / Elements<C>::kVectors>(n, w, values, 0, dv, state.acc + row * n.acc_width, factor, ahead);
    }
  };
#if BK_QUARTERS
  if constexpr (R > 1 && kSteps > 0 && Elements<C>::kKeysAtOnce == 2) {
    const PairRows<R, kSteps> rows(q, n.d);
    return blocks([&](int64_t t) __attribute__((always_inline)) {
      vf x[R];
      PairRows<R, kSteps>::products(rows, keys, t, ahead, x);
      for (int r = 0; r < R; ++r) store(s + r * kKeys + t, x[r]);
    });
  }
#endif
  blocks([&](int64_t t) __attribute__((always_inline)) {
    for_turns<R>([&](auto turn) __attribute__((always_inline)) {
      constexpr int r = decltype(turn)::value;
      vf x = ahead ? line_products<C, kSteps, r, R>(q + r * n.d, keys, t, d)
                   : line_products<C, kSteps, 1, 1>(q + r * n.d, keys, t, d);
      store(s + r * kKeys + t, x);
    });
  });
}

// All rows of a head and `count` keys, a multiple of kKeys; q is what Vectors<C>::put_query made.
template <class C>
void line_block(const Layout& n, const char* q, const State& state, const Line& keys, const Line& values, int64_t count,
                int64_t d, int64_t dv, float scale) {
  constexpr int64_t step = Elements<C>::kStep;
  for_any_rows(n.rows, [&](auto tile, int64_t r) __attribute__((always_inline)) {
    constexpr int R = decltype(tile)::value;
    const Left<C>* rows = (const Left<C>*)(q + r * n.q_row);
    auto call = [&](auto steps, auto dense) __attribute__((always_inline)) {
      line_rows<C, R, decltype(steps)::value, decltype(dense)::value>(n, rows, state, r, keys, values, count, d, dv,
                                                                      scale, r == 0);
    };
    const bool dense = d == dv && keys.by == d * (int64_t)sizeof(C) && values.by == keys.by;
    if (d == 2 * step)
      dense ? call(Number<2>(), Number<true>()) : call(Number<2>(), Number<false>());
    else if (d == 4 * step)
      dense ? call(Number<4>(), Number<true>()) : call(Number<4>(), Number<false>());
    else
      call(Number<0>(), Number<false>());
  });
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
