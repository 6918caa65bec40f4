// One chunk of one parameter through an optimizer step, a block at a time: formats to floats, the rule, floats to
// formats. A block's floats stay in the first-level cache.
#include "optimizer_formats.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

struct VectorMath {
  BK_INLINE vf sqrt(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE__)
    return (vf)_mm_sqrt_ps((__m128)x);
#else
    for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
  }
  BK_INLINE vf max(vf a, vf b) { return vmax(a, b); }
  BK_INLINE vf sign(vf x) {
    vf negative = select_less(x, vf{}, splat(-1.0f), x);  // zero and NaN stay
    return select_less(vf{}, x, splat(1.0f), negative);
  }
  BK_INLINE vf where_nonnegative(vf condition, vf value) { return select(condition >= 0.0f, value, vf{}); }
};

// The buffers of a block that is not float32, or not whole.
struct Buffers {
  alignas(64) float param[kBlock], grad[kBlock], state[kStates][kBlock];
};

// Elements of a block are worked on in groups of so many: the random words of stochastic rounding come in such.
constexpr int64_t kGroup = 4 * W > 32 ? 4 * W : 32;

// The n floats at `in`, or their copy in `buffer` with zeros up to the end of the group.
BK_INLINE float* floats(void* in, float* buffer, int64_t n, int64_t padded) {
  if (n == padded) return (float*)in;
  __builtin_memcpy(buffer, in, n * 4);
  for (int64_t i = n; i < padded; ++i) buffer[i] = 0.0f;
  return buffer;
}
BK_INLINE void put_back(void* out, const float* floats, int64_t n) {
  if (out != floats) __builtin_memcpy(out, floats, n * 4);
}

// 8 or 16 bits likewise: whole where they are, else through a copy of the last ones.
template <class T>
struct Part {
  T copy[kBlock];
  T* data;
  Part(T* in, int64_t n, int64_t padded) : data(in) {
    if (n == padded) return;
    data = copy;
    __builtin_memcpy(copy, in, n * sizeof(T));
    __builtin_memset(copy + n, 0, (padded - n) * sizeof(T));
  }
  void put_back(T* out, int64_t n) const {
    if (data != out) __builtin_memcpy(out, data, n * sizeof(T));
  }
};

float* open_16(Type type, const void* in, float* buffer, int64_t n, int64_t padded) {
  Part<uint16_t> part((uint16_t*)in, n, padded);
  type == Type::bf16 ? widen_block<bf16>(part.data, buffer, padded) : widen_block<f16>(part.data, buffer, padded);
  return buffer;
}

float* open_floats(Type type, const void* in, int64_t at, float* buffer, int64_t n, int64_t padded) {
  if (type == Type::f32) return floats((float*)in + at, buffer, n, padded);
  return open_16(type, (const uint16_t*)in + at, buffer, n, padded);
}

float* open_param(const OptimizerTensor& t, int64_t at, float* buffer, int64_t n, int64_t padded) {
  if (!t.remainder) return open_floats((Type)t.param_type, t.param, at, buffer, n, padded);
  Part<uint16_t> high((uint16_t*)t.param + at, n, padded);
  Part<int16_t> rest(t.remainder + at, n, padded);
  join_block(high.data, rest.data, buffer, padded);
  return buffer;
}

void close_param(const OptimizerTensor& t, const OptimizerScalars& s, int64_t at, float* x, int64_t n, int64_t padded) {
  if ((Type)t.param_type == Type::f32) return put_back((float*)t.param + at, x, n);
  uint16_t* out = (uint16_t*)t.param + at;
  Part<uint16_t> high(out, n, padded);
  if (t.remainder) {
    Part<int16_t> rest(t.remainder + at, n, padded);
    split_block(x, high.data, rest.data, padded);
    rest.put_back(t.remainder + at, n);
  } else if ((Type)t.param_type == Type::bf16) {
    narrow_bf16(x, high.data, padded, s, at);
  } else {
    narrow_f16(x, (f16*)high.data, padded, s, at);
  }
  high.put_back(out, n);
}

// Only second moments and sums of squares have no sign.
constexpr bool has_sign(Algorithm a, int state) {
  return !((a == Algorithm::adam && state > 0) || (a == Algorithm::lamb && state == 1) ||
           (a == Algorithm::rmsprop && state == 0) || a == Algorithm::adagrad);
}

float* open_state(const OptimizerTensor& t, int k, bool sign, int64_t at, float* buffer, int64_t n, int64_t padded) {
  switch ((StateType)t.state_type) {
    case StateType::f32: return floats((float*)t.state[k] + at, buffer, n, padded);
    case StateType::bf16: return open_16(Type::bf16, (uint16_t*)t.state[k] + at, buffer, n, padded);
    case StateType::int8: {
      Part<uint8_t> codes((uint8_t*)t.state[k] + at, n, padded);
      float scale = t.scale[k][at / kBlock];
      sign ? decode8<true>(codes.data, scale, buffer, padded) : decode8<false>(codes.data, scale, buffer, padded);
      return buffer;
    }
  }
  return buffer;
}

void close_state(const OptimizerTensor& t, int k, bool sign, int64_t at, float* x, int64_t n, int64_t padded) {
  switch ((StateType)t.state_type) {
    case StateType::f32: return put_back((float*)t.state[k] + at, x, n);
    case StateType::bf16: {
      Part<uint16_t> part((uint16_t*)t.state[k] + at, n, padded);
      const OptimizerScalars nearest = {};
      narrow_bf16(x, part.data, padded, nearest, at);
      return part.put_back((uint16_t*)t.state[k] + at, n);
    }
    case StateType::int8: {
      for (int64_t i = n; i < padded; ++i) x[i] = 0.0f;
      Part<uint8_t> codes((uint8_t*)t.state[k] + at, n, padded);
      t.scale[k][at / kBlock] =
          sign ? encode8<true>(x, codes.data, padded) : encode8<false>(x, codes.data, padded);
      return codes.put_back((uint8_t*)t.state[k] + at, n);
    }
  }
}

template <Algorithm A>
void step_block(float* __restrict p, const float* __restrict g, float* __restrict a, float* __restrict b,
                float* __restrict c, int64_t n, const OptimizerScalars& s) {
  const OptimizerScalars scalars = s;
  for (int64_t i = 0; i < n; i += W) {
    vf x = a ? load(a + i) : vf{}, y = b ? load(b + i) : vf{}, z = c ? load(c + i) : vf{};
    write(p + i, Update<A>::template apply<VectorMath>(scalars, load(p + i), load(g + i), x, y, z));
    if (a) write(a + i, x);
    if (b) write(b + i, y);
    if (c) write(c + i, z);
  }
}

void average_block(float* ema, const float* p, int64_t n, float weight) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    vf e = load(ema + i);
    write(ema + i, e + (load(p + i) - e) * weight);
  }
  for (; i < n; ++i) ema[i] += (p[i] - ema[i]) * weight;
}

template <Algorithm A>
void step_chunk(const OptimizerTensor& t, const OptimizerGrad& grad, const OptimizerScalars& s,
                const OptimizerChunk& chunk) {
  Buffers buffers;
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    int64_t n = chunk.end - at < kBlock ? chunk.end - at : kBlock;
    int64_t padded = (n + kGroup - 1) / kGroup * kGroup;
    float* p = open_param(t, at, buffers.param, n, padded);
    const float* g = open_floats((Type)grad.type, grad.data, at, buffers.grad, n, padded);
    float* states[kStates] = {};
    for (int k = 0; k < Update<A>::states; ++k)
      if (t.state[k]) states[k] = open_state(t, k, has_sign(A, k), at, buffers.state[k], n, padded);
    step_block<A>(p, g, states[0], states[1], states[2], padded, s);
    for (int k = 0; k < Update<A>::states; ++k)
      if (t.state[k]) close_state(t, k, has_sign(A, k), at, states[k], n, padded);
    close_param(t, s, at, p, n, padded);
    if (t.ema) average_block(t.ema + at, p, n, s.ema);
  }
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
  switch (algorithm) {
    case Algorithm::adam: return step_chunk<Algorithm::adam>(t, grad, s, chunk);
    case Algorithm::sgd: return step_chunk<Algorithm::sgd>(t, grad, s, chunk);
    case Algorithm::rmsprop: return step_chunk<Algorithm::rmsprop>(t, grad, s, chunk);
    case Algorithm::adagrad: return step_chunk<Algorithm::adagrad>(t, grad, s, chunk);
    case Algorithm::lion: return step_chunk<Algorithm::lion>(t, grad, s, chunk);
    case Algorithm::lamb: return step_chunk<Algorithm::lamb>(t, grad, s, chunk);
    case Algorithm::muon: return step_chunk<Algorithm::muon>(t, grad, s, chunk);
  }
}

// LAMB's first pass: the states, and the sums of squares of the parameter and of the direction.
void optimizer_measure(const OptimizerTensor& t, const OptimizerGrad& grad, const OptimizerScalars& s,
                       const OptimizerChunk& chunk, double* sums) {
  constexpr Algorithm A = Algorithm::lamb;
  Buffers buffers;
  sums[0] = sums[1] = 0.0;
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    int64_t n = chunk.end - at < kBlock ? chunk.end - at : kBlock;
    int64_t padded = (n + kGroup - 1) / kGroup * kGroup;
    alignas(64) float direction[kBlock];
    const float* p = open_param(t, at, buffers.param, n, padded);
    const float* g = open_floats((Type)grad.type, grad.data, at, buffers.grad, n, padded);
    float* m = open_state(t, 0, has_sign(A, 0), at, buffers.state[0], n, padded);
    float* v = open_state(t, 1, has_sign(A, 1), at, buffers.state[1], n, padded);
    for (int64_t i = 0; i < padded; i += W) {
      vf x = load(m + i), y = load(v + i);
      write(direction + i, Update<A>::measure<VectorMath>(s, load(p + i), load(g + i), x, y));
      write(m + i, x), write(v + i, y);
    }
    for (int64_t i = n; i < padded; ++i) direction[i] = 0.0f;  // 0 / 0 where eps is 0
    sums[0] += squares(p, padded), sums[1] += squares(direction, padded);
    close_state(t, 0, has_sign(A, 0), at, m, n, padded);
    close_state(t, 1, has_sign(A, 1), at, v, n, padded);
  }
}

// The sum of |x|^2, or of the largest |x| for `infinity`; NaN is kept by either.
double optimizer_norm(const OptimizerGrad& grad, const OptimizerChunk& chunk, bool infinity) {
  alignas(64) float buffer[kBlock];
  double total = 0.0;
  int32_t largest = 0;
  for (int64_t at = chunk.begin; at < chunk.end; at += kBlock) {
    int64_t n = chunk.end - at < kBlock ? chunk.end - at : kBlock;
    int64_t padded = (n + kGroup - 1) / kGroup * kGroup;
    const float* g = open_floats((Type)grad.type, grad.data, at, buffer, n, padded);
    if (infinity) {
      vi most = {};
      for (int64_t i = 0; i < padded; i += W) most = vmax_int(most, read<vi>(g + i) & 0x7fffffff);
      for (int i = 0; i < W; ++i) largest = most[i] > largest ? most[i] : largest;
    } else {
      total += squares(g, padded);
    }
  }
  if (!infinity) return total;
  float value;
  __builtin_memcpy(&value, &largest, 4);
  return value;
}

}  // namespace BK_ISA
}  // namespace bigkernels
