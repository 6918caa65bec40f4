// An activation by itself: where the product before it is not one of this package, or has no pass over its result.
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

template <class T, Activation kind>
void forward(const Activate& a, int64_t begin, int64_t end) {
  const T* in = (const T*)a.in;
  T* out = (T*)a.out;
  int64_t i = begin * a.n, last = end * a.n;
  if (a.stream) {
    for (; i + 2 * W <= last; i += 2 * W) {
      prefetch_ahead(in + i);
      stream2(out + i, activate<kind>(load(in + i)), activate<kind>(load(in + i + W)));
    }
    fence();
  }
  for (; i < last; i += W) {
    int64_t n = last - i < W ? last - i : W;
    put(out + i, activate<kind>(get(in + i, n)), n);
  }
}

template <class T, Activation kind>
void backward(const Activate& a, int64_t begin, int64_t end) {
  const T *in = (const T*)a.in, *grad = (const T*)a.grad;
  T *out = (T*)a.out, *value = (T*)a.value;
  int64_t i = begin * a.n, last = end * a.n;
  if (a.stream) {
    for (; i + 2 * W <= last; i += 2 * W) {
      prefetch_ahead(in + i);
      prefetch_ahead(grad + i);
      vf slope[2], y[2] = {activate<kind>(load(in + i), &slope[0]), activate<kind>(load(in + i + W), &slope[1])};
      stream2(out + i, load(grad + i) * slope[0], load(grad + i + W) * slope[1]);
      if (value) stream2(value + i, y[0], y[1]);
    }
    fence();
  }
  for (; i < last; i += W) {
    int64_t n = last - i < W ? last - i : W;
    vf slope, y = activate<kind>(get(in + i, n), &slope);
    put(out + i, get(grad + i, n) * slope, n);
    if (value) put(value + i, y, n);
  }
}

template <class T, bool kBackward>
void dispatch(const Activate& a, int64_t begin, int64_t end) {
  by_activation(a.act, [&](auto act) {
    constexpr Activation kind = decltype(act)::kind;
    kBackward ? backward<T, kind>(a, begin, end) : forward<T, kind>(a, begin, end);
  });
}

}  // namespace

void activate_fwd(const Activate& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto t) { dispatch<decltype(t), false>(a, begin, end); });
}
void activate_bwd(const Activate& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto t) { dispatch<decltype(t), true>(a, begin, end); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
