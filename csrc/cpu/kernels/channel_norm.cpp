// GroupNorm and BatchNorm, whose channels are planes of memory (a run of elements with one mean) or the columns of rows
// (each element of a row with a mean of its own), with an activation and, before it, a residual.
#include <bigkernels/layers.h>

#include "slope.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

template <class T>
BK_INLINE vf get(const T* p, int64_t n) {
  return n == W ? load(p) : load(p, n);
}
template <class T>
BK_INLINE void put(T* p, vf v, int64_t n) {
  n == W ? store(p, v) : store(p, v, n);
}
// Lanes below n, zero beyond.
BK_INLINE vf first(vf v, int64_t n) {
  for (int l = 0; l < W; ++l) v[l] = l < n ? v[l] : 0.0f;
  return v;
}
// What belongs to the channel of element j.
template <bool kRows>
BK_INLINE vf of(const float* p, int64_t j, int64_t n) {
  return kRows ? get(p + j, n) : splat(*p);
}

// ---- planes: sums of a run ------------------------------------------------------------------------------------------

// In float32 no more than this many elements are added up.
constexpr int64_t kChunk = 1024;

// take(i, n, one, two) adds to both vectors what elements [i, i + n) give.
template <class F>
BK_INLINE void sum_run(int64_t begin, int64_t end, double* sums, F take) {
  while (begin < end) {
    int64_t last = end - begin < kChunk ? end : begin + kChunk, i = begin;
    vf one[2] = {}, two[2] = {};
    for (; i + 2 * W <= last; i += 2 * W) {
      take(i, (int64_t)W, one[0], two[0]);
      take(i + W, (int64_t)W, one[1], two[1]);
    }
    for (; i < last; i += W) take(i, last - i < W ? last - i : (int64_t)W, one[0], two[0]);
    sums[0] += sum(one[0] + one[1]), sums[1] += sum(two[0] + two[1]);
    begin = last;
  }
}

template <class T>
void run_moments(const ChannelNorm& a, int64_t begin, int64_t end, double* sums) {
  const T* x = (const T*)a.x;
  vf guess = splat(*a.mean);
  sum_run(begin, end, sums, [&](int64_t i, int64_t n, vf& one, vf& two) __attribute__((always_inline)) {
    vf v = get(x + i, n) - guess;
    if (n < W) v = first(v, n);
    one += v;
    two += v * v;
  });
}

// The gradient of the activation's input, for elements at i, of channel j.
template <class T, Activation kAct, bool kRows>
BK_INLINE vf inner(const ChannelNorm& a, int64_t i, int64_t j, int64_t n, vf centred) {
  vf g = get((const T*)a.grad + i, n);
  if constexpr (kAct != Activation::identity) {
    if (kAct == Activation::relu && a.result) {
      g = select(get((const T*)a.result + i, n) <= vf{}, vf{}, g);
    } else {
      vf slope;
      activate<kAct>(centred * of<kRows>(a.scale, j, n) + of<kRows>(a.shift, j, n), &slope);
      g *= slope;
    }
  }
  return g;
}

template <class T, Activation kAct>
void run_bwd_sums(const ChannelNorm& a, int64_t begin, int64_t end, double* sums) {
  const T* x = (const T*)a.x;
  vf mean = splat(*a.mean), rstd = splat(*a.rstd);
  sum_run(begin, end, sums, [&](int64_t i, int64_t n, vf& one, vf& two) __attribute__((always_inline)) {
    vf centred = get(x + i, n) - mean, g = inner<T, kAct, false>(a, i, 0, n, centred);  // 0 where grad has no lane
    one += g;
    two += g * (centred * rstd);
  });
}

// ---- rows: sums of columns ------------------------------------------------------------------------------------------

BK_INLINE void settle(float* recent, double* total, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] += recent[i], recent[i] = 0.0f;
}

template <class F>
BK_INLINE void sum_rows(const ChannelNorm& a, int64_t begin, int64_t end, float* recent, double* total, F take) {
  for (int64_t r = begin; r < end; ++r) {
    int64_t j = 0;
    for (; j + W <= a.n; j += W) take(r * a.n + j, j, (int64_t)W);
    if (j < a.n) take(r * a.n + j, j, a.n - j);
    if ((r - begin) % kRowsAtOnce == kRowsAtOnce - 1 || r == end - 1) settle(recent, total, 2 * a.n);
  }
}

template <class T>
void rows_moments(const ChannelNorm& a, int64_t begin, int64_t end, float* recent, double* total) {
  const T* x = (const T*)a.x;
  sum_rows(a, begin, end, recent, total, [&](int64_t i, int64_t j, int64_t n) __attribute__((always_inline)) {
    vf v = get(x + i, n) - get(a.mean + j, n);
    put(recent + j, get(recent + j, n) + v, n);
    put(recent + a.n + j, get(recent + a.n + j, n) + v * v, n);
  });
}

template <class T, Activation kAct>
void rows_bwd_sums(const ChannelNorm& a, int64_t begin, int64_t end, float* recent, double* total) {
  const T* x = (const T*)a.x;
  sum_rows(a, begin, end, recent, total, [&](int64_t i, int64_t j, int64_t n) __attribute__((always_inline)) {
    vf centred = get(x + i, n) - get(a.mean + j, n), g = inner<T, kAct, true>(a, i, j, n, centred);
    put(recent + j, get(recent + j, n) + g, n);
    put(recent + a.n + j, get(recent + a.n + j, n) + g * (centred * get(a.rstd + j, n)), n);
  });
}

// ---- results --------------------------------------------------------------------------------------------------------

// Elements [begin, end) of one channel, or all of a row from element begin on: j counts its channels.
template <class T, Activation kAct, bool kRows>
BK_INLINE void apply(const ChannelNorm& a, int64_t begin, int64_t end) {
  const T *x = (const T*)a.x, *residual = (const T*)a.residual;
  T* out = (T*)a.out;
  auto one = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    int64_t j = i - begin;
    vf z = (get(x + i, n) - of<kRows>(a.mean, j, n)) * of<kRows>(a.scale, j, n) + of<kRows>(a.shift, j, n);
    if (residual) z += get(residual + i, n);
    return activate<kAct>(z);
  };
  int64_t i = begin;
  if (a.stream)
    for (; i + 2 * W <= end; i += 2 * W) stream2(out + i, one(i, W), one(i + W, W));
  for (; i + W <= end; i += W) store(out + i, one(i, W));
  if (i < end) store(out + i, one(i, end - i), end - i);
}

template <class T, Activation kAct, bool kRows>
BK_INLINE void differentiate(const ChannelNorm& a, int64_t begin, int64_t end) {
  const T* x = (const T*)a.x;
  T *out = (T*)a.out, *of_residual = (T*)a.out_residual;
  struct Both {
    vf x, residual;
  };
  auto one = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    int64_t j = i - begin;
    vf centred = get(x + i, n) - of<kRows>(a.mean, j, n), g = inner<T, kAct, kRows>(a, i, j, n, centred);
    return Both{g * of<kRows>(a.of_grad, j, n) + centred * of<kRows>(a.of_x, j, n) + of<kRows>(a.constant, j, n), g};
  };
  int64_t i = begin;
  if (a.stream)
    for (; i + 2 * W <= end; i += 2 * W) {
      Both p = one(i, W), q = one(i + W, W);
      stream2(out + i, p.x, q.x);
      if (of_residual) stream2(of_residual + i, p.residual, q.residual);
    }
  for (; i < end; i += W) {
    int64_t n = end - i < W ? end - i : W;
    Both p = one(i, n);
    put(out + i, p.x, n);
    if (of_residual) put(of_residual + i, p.residual, n);
  }
}

template <class T, Activation kAct, bool kRows, bool kBackward>
void results(const ChannelNorm& a, int64_t begin, int64_t end) {
  int64_t step = kRows ? a.n : end - begin;
  int64_t from = kRows ? begin * a.n : begin, to = kRows ? end * a.n : end;
  for (; from < to; from += step)
    kBackward ? differentiate<T, kAct, kRows>(a, from, from + step) : apply<T, kAct, kRows>(a, from, from + step);
  if (a.stream) fence();
}

// f(type, activation)
template <class F>
BK_INLINE void by_both(const ChannelNorm& a, F f) {
  by_type(a.type, [&](auto t) {
    switch (a.act) {
      case Activation::silu: return f(t, Kind<Activation::silu>());
      case Activation::gelu: return f(t, Kind<Activation::gelu>());
      case Activation::gelu_tanh: return f(t, Kind<Activation::gelu_tanh>());
      case Activation::relu: return f(t, Kind<Activation::relu>());
      default: return f(t, Kind<Activation::identity>());
    }
  });
}
}  // namespace

void norm_run_moments(const ChannelNorm& a, int64_t begin, int64_t end, double* sums) {
  by_type(a.type, [&](auto t) { run_moments<decltype(t)>(a, begin, end, sums); });
}
void norm_rows_moments(const ChannelNorm& a, int64_t begin, int64_t end, float* recent, double* total) {
  by_type(a.type, [&](auto t) { rows_moments<decltype(t)>(a, begin, end, recent, total); });
}
void norm_run_bwd_sums(const ChannelNorm& a, int64_t begin, int64_t end, double* sums) {
  by_both(a, [&](auto t, auto act) { run_bwd_sums<decltype(t), decltype(act)::kind>(a, begin, end, sums); });
}
void norm_rows_bwd_sums(const ChannelNorm& a, int64_t begin, int64_t end, float* recent, double* total) {
  by_both(a, [&](auto t, auto act) { rows_bwd_sums<decltype(t), decltype(act)::kind>(a, begin, end, recent, total); });
}
void norm_run(const ChannelNorm& a, int64_t begin, int64_t end) {
  by_both(a, [&](auto t, auto act) { results<decltype(t), decltype(act)::kind, false, false>(a, begin, end); });
}
void norm_rows(const ChannelNorm& a, int64_t begin, int64_t end) {
  by_both(a, [&](auto t, auto act) { results<decltype(t), decltype(act)::kind, true, false>(a, begin, end); });
}
void norm_run_bwd(const ChannelNorm& a, int64_t begin, int64_t end) {
  by_both(a, [&](auto t, auto act) { results<decltype(t), decltype(act)::kind, false, true>(a, begin, end); });
}
void norm_rows_bwd(const ChannelNorm& a, int64_t begin, int64_t end) {
  by_both(a, [&](auto t, auto act) { results<decltype(t), decltype(act)::kind, true, true>(a, begin, end); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
