// Gated linear units: the activation's value and slope from one evaluation of its exponential.
#include "slope.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

template <class T, Activation kind>
void forward(const Glu& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = (const T*)a.gate.data + r * a.gate.stride;
    const T* up = (const T*)a.up.data + r * a.up.stride;
    T* out = (T*)a.out + r * a.n;
    int64_t i = 0;
    if (a.stream) {
      for (; i + 2 * W <= a.n; i += 2 * W) {
        prefetch_ahead(gate + i);
        prefetch_ahead(up + i);
        stream2(out + i, activate<kind>(load(gate + i)) * load(up + i),
                activate<kind>(load(gate + i + W)) * load(up + i + W));
      }
    }
    for (; i + W <= a.n; i += W) store(out + i, activate<kind>(load(gate + i)) * load(up + i));
    if (i < a.n) store(out + i, activate<kind>(load(gate + i, a.n - i)) * load(up + i, a.n - i), a.n - i);
  }
  if (a.stream) fence();
}

template <class T, Activation kind>
void backward(const Glu& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = (const T*)a.gate.data + r * a.gate.stride;
    const T* up = (const T*)a.up.data + r * a.up.stride;
    const T* grad = (const T*)a.grad.data + r * a.grad.stride;
    T* d_gate = (T*)a.out + r * a.n;
    T* d_up = (T*)a.out2 + r * a.n;
    int64_t i = 0;
    if (a.stream) {
      for (; i + 2 * W <= a.n; i += 2 * W) {
        prefetch_ahead(gate + i);
        prefetch_ahead(up + i);
        prefetch_ahead(grad + i);
        vf slope[2], g[2] = {load(grad + i), load(grad + i + W)};
        vf value[2] = {activate<kind>(load(gate + i), &slope[0]), activate<kind>(load(gate + i + W), &slope[1])};
        stream2(d_gate + i, g[0] * load(up + i) * slope[0], g[1] * load(up + i + W) * slope[1]);
        stream2(d_up + i, g[0] * value[0], g[1] * value[1]);
      }
    }
    for (; i + W <= a.n; i += W) {
      vf slope, g = load(grad + i), value = activate<kind>(load(gate + i), &slope);
      store(d_gate + i, g * load(up + i) * slope);
      store(d_up + i, g * value);
    }
    if (i < a.n) {
      int64_t n = a.n - i;
      vf slope, g = load(grad + i, n), value = activate<kind>(load(gate + i, n), &slope);
      store(d_gate + i, g * load(up + i, n) * slope, n);
      store(d_up + i, g * value, n);
    }
  }
  if (a.stream) fence();
}

// run(the storage type, the activation)
template <class Run>
BK_INLINE void dispatch(const Glu& a, Run run) {
  by_type(a.type, [&](auto t) { by_activation(a.activation, [&](auto activation) { run(t, activation); }); });
}

}  // namespace

void glu_fwd(const Glu& a, int64_t begin, int64_t end) {
  dispatch(a, [&](auto t, auto activation) { forward<decltype(t), activation.kind>(a, begin, end); });
}
void glu_bwd(const Glu& a, int64_t begin, int64_t end) {
  dispatch(a, [&](auto t, auto activation) { backward<decltype(t), activation.kind>(a, begin, end); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
