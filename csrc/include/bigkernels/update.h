// The optimizers' update rules, each written once: for vectors of a CPU level and for single floats on a GPU.
//
// V is float or a vector of floats; `Math` names maximum (its second argument where either is NaN), sign (NaN stays),
// selection, and a / (sqrt(b) * scale + eps), the costly part of most rules, for it. All arithmetic is in
// float32; the scalars were computed in float64. Formulas and the order of operations are those of torch.optim, so that
// results differ from it by float32 rounding only.
#pragma once
#include "optimizer.h"

#if defined(__CUDACC__)
#define BK_BOTH static __host__ __device__ __forceinline__
#else
#define BK_BOTH static inline __attribute__((always_inline, unused))
#endif

namespace bigkernels {
#if defined(BK_ISA)
namespace BK_ISA {
#endif
namespace {

// b^n for whole n >= 0, exact to a few units of float64: no library function, so that every device gives the same.
BK_BOTH double power(double b, double n) {
  double result = 1.0;
  for (unsigned long long k = (unsigned long long)n; k; k >>= 1, b *= b)
    if (k & 1) result *= b;
  return result;
}

BK_BOTH uint32_t mix(uint32_t x) {  // a bijection of 32 bits without visible structure (Wellons' lowbias32 constants)
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0xd35a2d97u;
  return x ^ (x >> 15);
}

BK_BOTH double lr_of(const OptimizerGroup& g) {
  if (!g.lr_tensor) return g.lr;
  return g.lr_is_double ? *(const double*)g.lr_tensor : (double)*(const float*)g.lr_tensor;
}

// What takes the bias of their start from zero out of the first moment, and out of the root of the second (returned).
BK_BOTH float unbiased(const OptimizerGroup& g, double step, double* first) {
  *first = 1.0 / (1.0 - power(g.beta1, step));
  return (float)(1.0 / __builtin_sqrt(1.0 - power(g.beta2, step)));
}

// p after the decay that goes before the update u (which is subtracted afterwards).
template <class Math, class V>
BK_BOTH V decayed(const OptimizerScalars& s, V p, V u) {
  if (s.flags & kCautious) return p - Math::where_nonnegative(u * p, p * s.shrink);
  return p * s.keep;
}

template <class Math, class V>
BK_BOTH V with_l2(const OptimizerScalars& s, V p, V g) {
  g = g * s.grad_factor;
  return s.l2 != 0.0f ? g + p * s.l2 : g;
}

// An algorithm: what is left in the states, and the parameter, with what the kernels have to know of it, as bits of its
// states: which it cannot do without (kNeeded), which it may have (kKnown), and which have no sign and are stored so in
// 8 bits (kUnsigned); bigkernels/optim/_reference.py says the same of its rules. `flags`: what follows from which
// states there are. `scalars`: what differs from those of `scalars_of`.
template <Algorithm>
struct Update;

struct SameScalars {
  BK_BOTH void scalars(const OptimizerGroup&, double, OptimizerScalars&) {}
  static constexpr int flags(int) { return 0; }
};

template <>
struct Update<Algorithm::adam> : SameScalars {
  static constexpr Algorithm kAlgorithm = Algorithm::adam;
  static constexpr int kNeeded = 3, kKnown = 7, kUnsigned = 6;
  // States: m, v, and with amsgrad the largest v.
  static constexpr int flags(int there) { return there & 4 ? kAmsgrad : 0; }
  BK_BOTH void scalars(const OptimizerGroup& g, double step, OptimizerScalars& s) {
    double unbias;
    s.second = unbiased(g, step, &unbias);
    s.step_size = (float)(lr_of(g) * unbias);
  }
  template <class Math, class V>
  BK_BOTH V apply(const OptimizerScalars& s, V p, V g, V& m, V& v, V& largest) {
    g = with_l2<Math>(s, p, g);
    m = m + (g - m) * s.rest1;
    v = v * s.beta2 + g * g * s.rest2;
    V second = v;
    if (s.flags & kAmsgrad) second = largest = Math::max(largest, v);
    V u = Math::over_root(m * s.step_size, second, s.second, s.eps);
    return decayed<Math>(s, p, u) - u;
  }
};

template <>
struct Update<Algorithm::sgd> : SameScalars {
  static constexpr Algorithm kAlgorithm = Algorithm::sgd;
  static constexpr int kNeeded = 0, kKnown = 1, kUnsigned = 0;
  static constexpr int flags(int there) { return there & 1 ? kMomentum : 0; }
  template <class Math, class V>
  BK_BOTH V apply(const OptimizerScalars& s, V p, V g, V& buffer, V&, V&) {
    g = with_l2<Math>(s, p, g);
    if (s.flags & kMomentum) {
      buffer = buffer * s.momentum + g * s.damped;
      g = s.flags & kNesterov ? g + buffer * s.momentum : buffer;
    }
    V u = g * s.step_size;
    return decayed<Math>(s, p, u) - u;
  }
};

template <>
struct Update<Algorithm::rmsprop> : SameScalars {
  static constexpr Algorithm kAlgorithm = Algorithm::rmsprop;
  static constexpr int kNeeded = 1, kKnown = 7, kUnsigned = 1;
  // Averages of squares, of steps (momentum), of gradients (centered).
  static constexpr int flags(int there) { return (there & 2 ? kMomentum : 0) | (there & 4 ? kCentered : 0); }
  template <class Math, class V>
  BK_BOTH V apply(const OptimizerScalars& s, V p, V g, V& square, V& buffer, V& mean) {
    g = with_l2<Math>(s, p, g);
    square = square * s.beta2 + g * g * s.rest2;
    V variance = square;
    if (s.flags & kCentered) {
      mean = mean + (g - mean) * s.rest2;
      variance = Math::max(V{}, square - mean * mean);  // rounding may take it below zero
    }
    V u = Math::over_root(g, variance, 1.0f, s.eps);
    if (s.flags & kMomentum) u = buffer = buffer * s.momentum + u;
    u = u * s.step_size;
    return decayed<Math>(s, p, u) - u;
  }
};

template <>
struct Update<Algorithm::adagrad> : SameScalars {
  static constexpr Algorithm kAlgorithm = Algorithm::adagrad;
  static constexpr int kNeeded = 1, kKnown = 1, kUnsigned = 1;
  BK_BOTH void scalars(const OptimizerGroup& g, double step, OptimizerScalars& s) {
    s.step_size = (float)(lr_of(g) / (1.0 + (step - 1.0) * g.lr_decay));
  }
  template <class Math, class V>
  BK_BOTH V apply(const OptimizerScalars& s, V p, V g, V& sum, V&, V&) {
    g = with_l2<Math>(s, p, g);
    sum = sum + g * g;
    V u = Math::over_root(g * s.step_size, sum, 1.0f, s.eps);
    return decayed<Math>(s, p, u) - u;
  }
};

template <>
struct Update<Algorithm::lion> : SameScalars {
  static constexpr Algorithm kAlgorithm = Algorithm::lion;
  static constexpr int kNeeded = 1, kKnown = 1, kUnsigned = 0;
  template <class Math, class V>
  BK_BOTH V apply(const OptimizerScalars& s, V p, V g, V& m, V&, V&) {
    g = with_l2<Math>(s, p, g);
    V u = Math::sign(m * s.beta1 + g * s.rest1) * s.step_size;
    m = m * s.beta2 + g * s.rest2;
    return decayed<Math>(s, p, u) - u;
  }
};

// In two passes: the first leaves the states and measures the direction, whose norm gives the trust ratio; the second
// makes the direction again from what the states hold, and takes the step.
template <>
struct Update<Algorithm::lamb> : SameScalars {
  static constexpr Algorithm kAlgorithm = Algorithm::lamb;
  static constexpr int kNeeded = 3, kKnown = 3, kUnsigned = 2;
  BK_BOTH void scalars(const OptimizerGroup& g, double step, OptimizerScalars& s) {
    double unbias;
    s.second = unbiased(g, step, &unbias);
    s.step_size = (float)unbias;
    if (g.flags & kDecoupled) s.shrink = (float)g.weight_decay;
  }
  template <class Math, class V>
  BK_BOTH V measure(const OptimizerScalars& s, V p, V g, V& m, V& v) {
    g = with_l2<Math>(s, p, g);
    m = m + (g - m) * s.rest1;
    v = v * s.beta2 + g * g * s.rest2;
    return direction<Math>(s, p, m, v);
  }
  template <class Math, class V>
  BK_BOTH V apply(const OptimizerScalars& s, V p, V, V& m, V& v, V&) {
    return p - direction<Math>(s, p, m, v) * (s.lr * s.trust);
  }
  template <class Math, class V>
  BK_BOTH V direction(const OptimizerScalars& s, V p, V m, V v) {
    V u = Math::over_root(m * s.step_size, v, s.second, s.eps);
    V decay = p * s.shrink;
    return u + (s.flags & kCautious ? Math::where_nonnegative(u * p, decay) : decay);
  }
};

// The update that is orthogonalised afterwards, as torch.optim.Muon makes it.
template <>
struct Update<Algorithm::muon> : SameScalars {
  static constexpr Algorithm kAlgorithm = Algorithm::muon;
  static constexpr int kNeeded = 1, kKnown = 1, kUnsigned = 0;
  template <class Math, class V>
  BK_BOTH V apply(const OptimizerScalars& s, V, V g, V& buffer, V&, V&) {
    g = g * s.grad_factor;
    buffer = buffer + (g - buffer) * (1.0f - s.momentum);
    return s.flags & kNesterov ? g + (buffer - g) * s.momentum : buffer;
  }
};

template <>
struct Update<Algorithm::adamax> : SameScalars {
  static constexpr Algorithm kAlgorithm = Algorithm::adamax;
  static constexpr int kNeeded = 3, kKnown = 3, kUnsigned = 2;
  BK_BOTH void scalars(const OptimizerGroup& g, double step, OptimizerScalars& s) {
    s.step_size = (float)(lr_of(g) / (1.0 - power(g.beta1, step)));
  }
  template <class Math, class V>
  BK_BOTH V apply(const OptimizerScalars& s, V p, V g, V& m, V& largest, V&) {
    g = with_l2<Math>(s, p, g);
    m = m + (g - m) * s.rest1;
    largest = Math::max(largest * s.beta2, Math::max(g, -g) + s.eps);
    V u = m * s.step_size / largest;
    return decayed<Math>(s, p, u) - u;
  }
};

template <Algorithm A>
constexpr bool has_sign(int state) {
  return !(Update<A>::kUnsigned >> state & 1);
}

// run(Update<algorithm>()): what is to be compiled once for each algorithm.
template <class Run>
BK_BOTH void by_algorithm(Algorithm algorithm, Run run) {
  switch (algorithm) {
    case Algorithm::adam: return run(Update<Algorithm::adam>());
    case Algorithm::sgd: return run(Update<Algorithm::sgd>());
    case Algorithm::rmsprop: return run(Update<Algorithm::rmsprop>());
    case Algorithm::adagrad: return run(Update<Algorithm::adagrad>());
    case Algorithm::lion: return run(Update<Algorithm::lion>());
    case Algorithm::lamb: return run(Update<Algorithm::lamb>());
    case Algorithm::muon: return run(Update<Algorithm::muon>());
    case Algorithm::adamax: return run(Update<Algorithm::adamax>());
  }
}

// `step` counts from 1. `factor` divides the loss scale out and clips.
BK_BOTH OptimizerScalars scalars_of(Algorithm algorithm, const OptimizerGroup& g, double step, double factor) {
  const double lr = lr_of(g);
  OptimizerScalars s = {};
  s.flags = (int32_t)g.flags;
  s.rounding = (int32_t)g.rounding;
  uint64_t count = (uint64_t)step;
  s.key = mix((uint32_t)g.seed ^ mix((uint32_t)(g.seed >> 32) ^ mix((uint32_t)count))) ^ mix((uint32_t)(count >> 32));
  s.grad_factor = (float)(g.flags & kMaximize ? -factor : factor);
  if (g.flags & kDecoupled) {
    s.shrink = (float)(lr * g.weight_decay);
    s.keep = (float)(1.0 - lr * g.weight_decay);
  } else {
    s.l2 = (float)g.weight_decay;
    s.keep = 1.0f;
  }
  s.beta1 = (float)g.beta1, s.rest1 = (float)(1.0 - g.beta1);
  s.beta2 = (float)g.beta2, s.rest2 = (float)(1.0 - g.beta2);
  s.eps = (float)g.eps, s.lr = (float)lr;
  s.step_size = (float)lr, s.second = 1.0f;
  s.momentum = (float)g.momentum;
  s.damped = step == 1.0 ? 1.0f : (float)(1.0 - g.dampening);
  s.ema = (float)(1.0 - g.ema_decay);
  s.trust = 1.0f;
  by_algorithm(algorithm, [&](auto rule) { rule.scalars(g, step, s); });
  return s;
}

}  // namespace
#if defined(BK_ISA)
}  // namespace BK_ISA
#endif
}  // namespace bigkernels
