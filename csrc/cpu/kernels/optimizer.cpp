// One chunk of one parameter through an optimizer step, a block at a time: formats to floats, the rule, floats to
// formats. A block's floats stay in the first-level cache.
#include "optimizer_formats.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

struct VectorMath {
#if defined(__AVX512F__)
  // From the machine's estimates with one Newton step each: within 4 ulp, in half the time of a root and a division. b
  // counts as at least 2^-126, whose root no eps notices; the estimates make no infinity of one, so that is seen to
  // apart.
  BK_INLINE vf over_root(vf a, vf b, float scale, float eps) {
    const vf most = splat(0x1.fffffep127f);
    vf c = vmin(most, vmax(splat(0x1p-126f), b));
    vf y = (vf)_mm512_rsqrt14_ps((__m512)c);
    vf root = c * y, half = y * 0.5f;
    root = root + root * (0.5f - root * half);
    vf d = root * scale + eps;
    vf r = (vf)_mm512_rcp14_ps((__m512)d);
    r = r * (2.0f - d * r);
    return a * select_less(most, b, vf{}, r);
  }
#else
  BK_INLINE vf over_root(vf a, vf b, float scale, float eps) { return a / (root(b) * scale + eps); }
  BK_INLINE vf root(vf x) {
#if defined(__AVX2__)
    return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE__)
    return (vf)_mm_sqrt_ps((__m128)x);
#else
    for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
  }
#endif
  BK_INLINE vf max(vf a, vf b) { return vmax(a, b); }
  BK_INLINE vf sign(vf x) {
    vf negative = select_less(x, vf{}, splat(-1.0f), x);  // zero and NaN stay
    return select_less(vf{}, x, splat(1.0f), negative);
  }
  BK_INLINE vf where_nonnegative(vf condition, vf value) { return select(condition >= 0.0f, value, vf{}); }
};

// For states of 8 bits, whose own error is a hundred times that of the machine's estimates (2^-12).
struct RoughMath : VectorMath {
  BK_INLINE vf over_root(vf a, vf b, float scale, float eps) {
#if defined(__AVX512F__)
    vf c = vmax(splat(0x1p-126f), b);
    vf root = c * (vf)_mm512_rsqrt14_ps((__m512)c);
    return a * (vf)_mm512_rcp14_ps((__m512)(root * scale + eps));
#elif defined(__AVX2__)
    vf c = vmax(splat(0x1p-126f), b);
    vf root = c * (vf)_mm256_rsqrt_ps((__m256)c);
    return a * (vf)_mm256_rcp_ps((__m256)(root * scale + eps));
#else
    return VectorMath::over_root(a, b, scale, eps);
#endif
  }
};

// Elements of a block are worked on in groups of so many: the random words of stochastic rounding come in such, and 8
// bits are stored four vectors at once.
constexpr int64_t kGroup = 4 * W > 32 ? 4 * W : 32;

// One block of a chunk.
struct Block {
  int64_t at, n, padded;
  Block(const OptimizerChunk& chunk, int64_t at)
      : at(at), n(chunk.end - at < kBlock ? chunk.end - at : kBlock), padded((n + kGroup - 1) / kGroup * kGroup) {}
};

// A block of an array where it lies, if it is whole groups; else a copy with zeros up to the end of the group, which
// `put_back` returns.
template <class T>
struct Part {
  T *home, *data;
  __attribute__((always_inline)) Part(T* array, const Block& b, void* copy) : home(array + b.at), data(home) {
    if (b.n == b.padded) return;
    data = (T*)copy;
    __builtin_memcpy(data, home, b.n * sizeof(T));
    __builtin_memset(data + b.n, 0, (b.padded - b.n) * sizeof(T));
  }
  __attribute__((always_inline)) void put_back(const Block& b) const {
    if (data != home) __builtin_memcpy(home, data, b.n * sizeof(T));
  }
};

const float* open_grad(const OptimizerGrad& grad, const Block& b, float* buffer) {
  if ((Type)grad.type == Type::f32) return Part<float>((float*)grad.data, b, buffer).data;
  uint16_t copy[kBlock];
  const Part<uint16_t> part((uint16_t*)grad.data, b, copy);
  if ((Type)grad.type == Type::bf16)
    widen_block<bf16>((const bf16*)part.data, buffer, b.padded);
  else
    widen_block<f16>((const f16*)part.data, buffer, b.padded);
  return buffer;
}

// The parameter, in whatever format, as floats, and back.
void open_param(const OptimizerTensor& t, const Block& b, float* x) {
  if (!t.remainder) {
    const float* read = open_grad({t.param, t.param_type}, b, x);
    if (read != x) __builtin_memcpy(x, read, b.padded * sizeof(float));
    return;
  }
  uint16_t copies[2][kBlock];
  const Part<uint16_t> high((uint16_t*)t.param, b, copies[0]);
  const Part<int16_t> rest(t.remainder, b, copies[1]);
  join_block(high.data, rest.data, x, b.padded);
}

void close_param(const OptimizerTensor& t, const OptimizerScalars& s, const Block& b, float* x) {
  if ((Type)t.param_type == Type::f32) {
    __builtin_memcpy((float*)t.param + b.at, x, b.n * sizeof(float));
    return;
  }
  uint16_t copies[2][kBlock];
  const Part<uint16_t> high((uint16_t*)t.param, b, copies[0]);
  if (t.remainder) {
    const Part<int16_t> rest(t.remainder, b, copies[1]);
    split_block(x, high.data, rest.data, b.padded);
    rest.put_back(b);
  } else if ((Type)t.param_type == Type::bf16) {
    narrow_bf16(x, high.data, b.padded, s, b.at);
  } else {
    narrow_f16(x, (f16*)high.data, b.padded, s, b.at);
  }
  high.put_back(b);
}

void average_block(float* ema, const float* p, int64_t n, float weight) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    vf e = load(ema + i);
    write(ema + i, e + (load(p + i) - e) * weight);
  }
  for (; i < n; ++i) ema[i] += (p[i] - ema[i]) * weight;
}

// One block of a state in the loop over vectors: read, and written in pairs. S: what it is made of in memory, Code8 for
// 8 bits. `copy` is room for a block of it, `buffer` for a block of floats.
struct Code8 {};

template <class S>
struct MathOf {
  typedef VectorMath type;
};
template <>
struct MathOf<Code8> {
  typedef RoughMath type;
};

template <class S, bool kSign>
struct State {
  Part<S> part;
  BK_METHOD State(const OptimizerTensor& t, int k, const Block& b, void* copy, float*)
      : part((S*)t.state[k], b, copy) {}
  BK_METHOD vf read(int64_t i) const { return load(part.data + i); }
  BK_METHOD void write2(int64_t i, vf x, vf y) { store_pair(part.data + i, x, y); }
  BK_METHOD void close(const OptimizerTensor&, int, const Block& b) { part.put_back(b); }
};

template <bool kSign>
struct State<Code8, kSign> {  // the new values wait in the buffer until the scale of their block is known
  Part<uint8_t> part;
  Decoder<kSign> decoder;
  float* buffer;
  Largest largest;
  BK_METHOD State(const OptimizerTensor& t, int k, const Block& b, void* copy, float* buffer)
      : part((uint8_t*)t.state[k], b, copy), decoder(part.data, t.scale[k][b.at / kBlock]), buffer(buffer) {}
  BK_METHOD vf read(int64_t i) const { return decoder[i]; }
  BK_METHOD void write2(int64_t i, vf x, vf y) {
    write(buffer + i, x), write(buffer + i + W, y);
    largest.see(x), largest.see(y);
  }
  BK_METHOD void close(const OptimizerTensor& t, int k, const Block& b) {
    if (b.n != b.padded) {  // elements beyond the end were zeros, and may be anything now
      for (int64_t i = b.n; i < b.padded; ++i) buffer[i] = 0.0f;
      largest = {};
      for (int64_t i = 0; i < b.padded; i += W) largest.see(load(buffer + i));
    }
    float scale = t.scale[k][b.at / kBlock] = largest.scale();
    encode8<kSign>(buffer, scale, part.data, b.padded);
    part.put_back(b);
  }
};

struct Absent {
  BK_METHOD Absent(const OptimizerTensor&, int, const Block&, void*, float*) {}
  BK_METHOD vf read(int64_t) const { return vf{}; }
  BK_METHOD void write2(int64_t, vf, vf) {}
  BK_METHOD void close(const OptimizerTensor&, int, const Block&) {}
};
template <bool kThere, class S, bool kSign>
struct StateOf {
  typedef State<S, kSign> type;
};
template <class S, bool kSign>
struct StateOf<false, S, kSign> {
  typedef Absent type;
};

// kPlain: of the flags only those that follow from the states, and no decay that is added to the gradient: then the
// loop has no branches.
template <Algorithm A, int kThere, bool kPlain, class Math, class P, class X, class Y, class Z>
BK_INLINE void step_block(const OptimizerScalars& given, const P* p, const P* g, P* out, int64_t n, X& x, Y& y, Z& z) {
  OptimizerScalars s = given;
  if (kPlain) s.flags = Update<A>::flags(kThere), s.l2 = 0.0f;
  for (int64_t i = 0; i < n; i += 2 * W) {
    vf p0 = load(p + i), p1 = load(p + i + W), g0 = load(g + i), g1 = load(g + i + W);
    vf x0 = x.read(i), x1 = x.read(i + W), y0 = y.read(i), y1 = y.read(i + W), z0 = z.read(i), z1 = z.read(i + W);
    p0 = Update<A>::template apply<Math>(s, p0, g0, x0, y0, z0);
    p1 = Update<A>::template apply<Math>(s, p1, g1, x1, y1, z1);
    store_pair(out + i, p0, p1);
    x.write2(i, x0, x1), y.write2(i, y0, y1), z.write2(i, z0, z1);
  }
}

// kThere: bits of the states that there are. P: the type of parameters and gradients that the loop reads and writes
// where they lie, rounding to nearest; all others pass through buffers.
template <Algorithm A, int kThere, class P, class S, bool kPlain>
void step_chunk(const OptimizerTensor& t, const OptimizerGrad& grad, const OptimizerScalars& s,
                const OptimizerChunk& chunk) {
  constexpr bool kFloat = sizeof(P) == 4;
  constexpr int64_t type = (int64_t)(kFloat ? Type::f32 : Type::bf16);
  const bool direct = t.param_type == type && grad.type == type && !t.remainder &&
                      (kFloat || (s.rounding == (int)Rounding::nearest && !t.ema));
  alignas(64) float param[kBlock], gradient[kBlock], copies[kStates][kBlock], buffers[kStates][kBlock];
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    const Block b(chunk, at);
    typename StateOf<(kThere & 1) != 0, S, has_sign<A>(0)>::type x(t, 0, b, copies[0], buffers[0]);
    typename StateOf<(kThere & 2) != 0, S, has_sign<A>(1)>::type y(t, 1, b, copies[1], buffers[1]);
    typename StateOf<(kThere & 4) != 0, S, has_sign<A>(2)>::type z(t, 2, b, copies[2], buffers[2]);
    if (direct) {
      const Part<P> p((P*)t.param, b, param), g((P*)grad.data, b, gradient);
      step_block<A, kThere, kPlain, typename MathOf<S>::type>(s, p.data, g.data, p.data, b.padded, x, y, z);
      p.put_back(b);
      if (kFloat && t.ema) average_block(t.ema + at, (const float*)p.data, b.n, s.ema);
    } else if (kFloat) {
      open_param(t, b, param);
      step_block<A, kThere, kPlain, typename MathOf<S>::type>(s, (const float*)param, open_grad(grad, b, gradient),
                                                              param, b.padded, x, y, z);
      close_param(t, s, b, param);
      if (t.ema) average_block(t.ema + at, param, b.n, s.ema);
    }
    x.close(t, 0, b), y.close(t, 1, b), z.close(t, 2, b);
  }
}

template <Algorithm A, int kThere, class S>
void step_by_type(const OptimizerTensor& t, const OptimizerGrad& grad, const OptimizerScalars& s,
                  const OptimizerChunk& chunk) {
  constexpr int64_t type = (int64_t)Type::bf16;
  const bool plain = s.l2 == 0.0f && !(s.flags & (kCautious | kNesterov));
  const bool direct = !t.remainder && !t.ema && s.rounding == (int)Rounding::nearest;
  if (direct && t.param_type == type && grad.type == type)
    plain ? step_chunk<A, kThere, bf16, S, true>(t, grad, s, chunk)
          : step_chunk<A, kThere, bf16, S, false>(t, grad, s, chunk);
  else
    plain ? step_chunk<A, kThere, float, S, true>(t, grad, s, chunk)
          : step_chunk<A, kThere, float, S, false>(t, grad, s, chunk);
}

template <Algorithm A, int kThere>
void step_by_state(const OptimizerTensor& t, const OptimizerGrad& grad, const OptimizerScalars& s,
                   const OptimizerChunk& chunk) {
  switch (kThere ? (StateType)t.state_type : StateType::f32) {
    case StateType::f32: return step_by_type<A, kThere, float>(t, grad, s, chunk);
    case StateType::bf16: return step_by_type<A, kThere, bf16>(t, grad, s, chunk);
    case StateType::int8: return step_by_type<A, kThere, Code8>(t, grad, s, chunk);
  }
}

// The step with the states that there are: one of the sets between those needed and those known, from `kThere` down.
template <Algorithm A, int kThere>
void step_by_states(int there, const OptimizerTensor& t, const OptimizerGrad& grad, const OptimizerScalars& s,
                    const OptimizerChunk& chunk) {
  constexpr int needed = Update<A>::kNeeded, optional = Update<A>::kKnown & ~needed;
  if (there == kThere || kThere == needed) return step_by_state<A, kThere>(t, grad, s, chunk);
  if constexpr (kThere != needed)
    step_by_states<A, needed | (((kThere & optional) - 1) & optional)>(there, t, grad, s, chunk);
}

BK_INLINE double squares(const float* x, int64_t n) {
  vf acc[4] = {};
  for (int64_t i = 0; i < n; i += 4 * W)
    for (int k = 0; k < 4; ++k) {
      vf v = load(x + i + k * W);
      acc[k] += v * v;
    }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

}  // namespace

void optimizer_step(Algorithm algorithm, const OptimizerTensor& t, const OptimizerGrad& grad, const OptimizerScalars& s,
                    const OptimizerChunk& chunk) {
  by_algorithm(algorithm, [&](auto rule) {
    int there = 0;
    for (int k = 0; k < kStates; ++k) there |= t.state[k] ? 1 << k : 0;
    step_by_states<rule.kAlgorithm, rule.kKnown>(there & rule.kKnown, t, grad, s, chunk);
  });
}

// LAMB's first pass: the states, and the sums of squares of the parameter and of the direction.
template <class S>
static void measure_chunk(const OptimizerTensor& t, const OptimizerGrad& grad, const OptimizerScalars& s,
                          const OptimizerChunk& chunk, double* sums) {
  constexpr Algorithm A = Algorithm::lamb;
  alignas(64) float param[kBlock], gradient[kBlock], direction[kBlock], copies[2][kBlock], buffers[2][kBlock];
  sums[0] = sums[1] = 0.0;
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    const Block b(chunk, at);
    State<S, has_sign<A>(0)> x(t, 0, b, copies[0], buffers[0]);
    State<S, has_sign<A>(1)> y(t, 1, b, copies[1], buffers[1]);
    open_param(t, b, param);
    const float* g = open_grad(grad, b, gradient);
    for (int64_t i = 0; i < b.padded; i += 2 * W) {
      vf x0 = x.read(i), x1 = x.read(i + W), y0 = y.read(i), y1 = y.read(i + W);
      write(direction + i, Update<A>::measure<VectorMath>(s, load(param + i), load(g + i), x0, y0));
      write(direction + i + W, Update<A>::measure<VectorMath>(s, load(param + i + W), load(g + i + W), x1, y1));
      x.write2(i, x0, x1), y.write2(i, y0, y1);
    }
    for (int64_t i = b.n; i < b.padded; ++i) direction[i] = 0.0f;  // 0 / 0 where eps is 0
    sums[0] += squares(param, b.padded), sums[1] += squares(direction, b.padded);
    x.close(t, 0, b), y.close(t, 1, b);
  }
}

void optimizer_measure(const OptimizerTensor& t, const OptimizerGrad& grad, const OptimizerScalars& s,
                       const OptimizerChunk& chunk, double* sums) {
  switch ((StateType)t.state_type) {
    case StateType::f32: return measure_chunk<float>(t, grad, s, chunk, sums);
    case StateType::bf16: return measure_chunk<bf16>(t, grad, s, chunk, sums);
    case StateType::int8: return measure_chunk<Code8>(t, grad, s, chunk, sums);
  }
}

// The sum of |x|^2, or of the largest |x| for `infinity`; NaN is kept by either.
double optimizer_norm(const OptimizerGrad& grad, const OptimizerChunk& chunk, bool infinity) {
  alignas(64) float buffer[kBlock];
  double total = 0.0;
  int32_t largest = 0;
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    const Block b(chunk, at);
    const float* g = open_grad(grad, b, buffer);
    if (infinity) {
      vi most = {};
      for (int64_t i = 0; i < b.padded; i += W) most = vmax_int(most, read<vi>(g + i) & 0x7fffffff);
      for (int i = 0; i < W; ++i) largest = most[i] > largest ? most[i] : largest;
    } else {
      total += squares(g, b.padded);
    }
  }
  if (!infinity) return total;
  float value;
  __builtin_memcpy(&value, &largest, 4);
  return value;
}

}  // namespace BK_ISA
}  // namespace bigkernels
