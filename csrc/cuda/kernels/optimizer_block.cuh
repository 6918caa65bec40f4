// A warp's work on one block of 256 elements: everything of an optimizer step that is not about launching. Runs on a
// GPU and, for the tests, on a host (lanes.cuh).
#pragma once
#include <bigkernels/cuda.h>

#include "optimizer_formats.cuh"

namespace bigkernels {
namespace cuda {
namespace {

// A lane has two runs of four elements, so that every access of a warp is one piece of memory: 16 bytes a lane in
// float32, 8 in 16 bits, 4 in 8 bits, whatever mix of formats a parameter has.
constexpr int kRun = 4;
constexpr int kRuns = kStateBlock / (kLanes * kRun);

struct Block {
  int64_t at;
  int n;  // of 256, the elements that there are
};

BK_DEVICE int start_of(int lane, int run) { return (run * kLanes + lane) * kRun; }

// A run of an array: as it lies in memory, from the first word on, or one element a word.
struct Four {
  uint32_t w[kRun];
};

template <int kBytes>
struct alignas(kRun* kBytes) Packed {
  uint32_t w[kBytes];
};
template <int kBytes>
struct Word;
template <>
struct Word<4> {
  typedef uint32_t type;
};
template <>
struct Word<2> {
  typedef uint16_t type;
};
template <>
struct Word<1> {
  typedef uint8_t type;
};

// Nothing here looks at what it loads, so that the loads of several arrays wait together. `i`: of the run's first
// element in the block.
template <int kBytes>
BK_DEVICE void fetch(Four& x, const void* array, const Block& b, int i) {
  const char* from = global((const char*)array + (b.at + i) * kBytes);
  const int left = b.n - i;
  if (left >= kRun && (uintptr_t)from % (kRun * kBytes) == 0) {
    const Packed<kBytes> packed = *(const Packed<kBytes>*)from;
    BK_UNROLL
    for (int k = 0; k < kBytes; ++k) x.w[k] = packed.w[k];
    return;
  }
  BK_UNROLL
  for (int k = 0; k < kBytes; ++k) x.w[k] = 0;
  BK_UNROLL
  for (int k = 0; k < kRun; ++k)
    if (k < left) x.w[k * kBytes / 4] |= (uint32_t)((const typename Word<kBytes>::type*)from)[k] << k * kBytes * 8 % 32;
}
BK_DEVICE void fetch(Four& x, const void* array, Type type, const Block& b, int i) {
  if (type == Type::f32)
    fetch<4>(x, array, b, i);
  else
    fetch<2>(x, array, b, i);
}
BK_DEVICE void fetch(Four& x, const void* array, StateType type, const Block& b, int i) {
  if (type == StateType::f32)
    fetch<4>(x, array, b, i);
  else if (type == StateType::bf16)
    fetch<2>(x, array, b, i);
  else
    fetch<1>(x, array, b, i);
}

// From one element a word.
template <int kBytes>
BK_DEVICE void put(const Four& x, void* array, const Block& b, int i) {
  char* to = global((char*)array + (b.at + i) * kBytes);
  const int left = b.n - i;
  if (left >= kRun && (uintptr_t)to % (kRun * kBytes) == 0) {
    Packed<kBytes> packed = {};
    BK_UNROLL
    for (int k = 0; k < kRun; ++k) packed.w[k * kBytes / 4] |= x.w[k] << k * kBytes * 8 % 32;
    *(Packed<kBytes>*)to = packed;
    return;
  }
  BK_UNROLL
  for (int k = 0; k < kRun; ++k)
    if (k < left) ((typename Word<kBytes>::type*)to)[k] = (typename Word<kBytes>::type)x.w[k];
}

// From how it lies in memory to one element a word.
BK_DEVICE void unpack16(Four& x) {
  const uint32_t low = x.w[0], high = x.w[1];
  x.w[0] = low & 0xffffu, x.w[1] = low >> 16, x.w[2] = high & 0xffffu, x.w[3] = high >> 16;
}
BK_DEVICE void to_floats(Four& x, Type type) {
  if (type == Type::f32) return;
  unpack16(x);
  BK_UNROLL
  for (int k = 0; k < kRun; ++k) x.w[k] = as_bits(widen(x.w[k], type));
}
BK_DEVICE void codes_to_floats(Four& x, bool sign, float scale) {
  const uint32_t codes = x.w[0];
  BK_UNROLL
  for (int k = 0; k < kRun; ++k) x.w[k] = as_bits(decode8(codes >> 8 * k & 0xffu, sign, scale));
}

struct SingleMath {
  // Exact, where the CPU kernels start from the machine's estimates: here it is memory that takes the time.
  BK_BOTH float over_root(float a, float b, float scale, float eps) { return a / (__builtin_sqrtf(b) * scale + eps); }
  BK_BOTH float max(float a, float b) { return a > b ? a : b; }
  BK_BOTH float sign(float x) { return x < 0.0f ? -1.0f : x > 0.0f ? 1.0f : x; }
  BK_BOTH float where_nonnegative(float condition, float value) { return condition >= 0.0f ? value : 0.0f; }
};

// How many places of states there are, whether or not this tensor has them.
template <Algorithm A>
constexpr int states_of() {
  return Update<A>::kKnown > 3 ? 3 : Update<A>::kKnown > 1 ? 2 : 1;
}
// The flags that say which states there are, from which there are: options may have changed since they were made.
template <Algorithm A>
BK_DEVICE int32_t true_flags(int32_t flags, const OptimizerTensor& t) {
  int there = 0;
  for (int k = 0; k < states_of<A>(); ++k) there |= t.state[k] ? 1 << k : 0;
  return (flags & ~(kAmsgrad | kMomentum | kCentered)) | Update<A>::flags(there);
}

// The parameter as float32.
BK_DEVICE void open_param(const OptimizerTensor& t, Four& p, Four& rest) {
  if (!t.remainder) return to_floats(p, (Type)t.param_type);
  unpack16(p), unpack16(rest);
  BK_UNROLL
  for (int k = 0; k < kRun; ++k) p.w[k] = as_bits(join(p.w[k], rest.w[k]));
}

// Leaves in p what the average is taken of: what was stored, or with a remainder what both hold together.
BK_DEVICE void close_param(const OptimizerTensor& t, const OptimizerScalars& s, const Block& b, int i, Four& p) {
  const Type type = (Type)t.param_type;
  if (type == Type::f32) return put<4>(p, t.param, b, i);
  Four high;
  if (t.remainder) {
    Four rest;
    BK_UNROLL
    for (int k = 0; k < kRun; ++k) high.w[k] = split(as_float(p.w[k]), &rest.w[k]);
    put<2>(rest, t.remainder, b, i);
  } else {
    BK_UNROLL
    for (int k = 0; k < kRun; ++k) {
      high.w[k] = narrow(as_float(p.w[k]), type, s, b.at + i + k);
      p.w[k] = as_bits(widen(high.w[k], type));
    }
  }
  put<2>(high, t.param, b, i);
}

BK_DEVICE void average(const OptimizerTensor& t, const OptimizerScalars& s, const Block& b, int i, const Four& p) {
  Four e;
  fetch<4>(e, t.ema, b, i);
  BK_UNROLL
  for (int k = 0; k < kRun; ++k) {
    const float old = as_float(e.w[k]);
    e.w[k] = as_bits(old + (as_float(p.w[k]) - old) * s.ema);
  }
  put<4>(e, t.ema, b, i);
}

// A state of 8 bits waits until the scale of its block is known: `largest` is the lane's part in it.
BK_DEVICE void close_state(const OptimizerTensor& t, int j, const Block& b, int i, Four& x, uint32_t& largest) {
  if ((StateType)t.state_type == StateType::f32) {
    put<4>(x, t.state[j], b, i);
  } else if ((StateType)t.state_type == StateType::bf16) {
    BK_UNROLL
    for (int k = 0; k < kRun; ++k) x.w[k] = nearest_bf16(as_float(x.w[k]));
    put<2>(x, t.state[j], b, i);
  } else {
    BK_UNROLL
    for (int k = 0; k < kRun; ++k) {
      // What lies beyond the end was zeros, and may be anything now.
      const uint32_t bits = i + k < b.n ? x.w[k] & 0x7fffffffu : 0u;
      largest = bits > largest ? bits : largest;
    }
  }
}

BK_DEVICE void close_codes(const OptimizerTensor& t, int j, bool sign, const Block& b, PerLane<Four>* state,
                           PerLane<uint32_t>& largest) {
  const float scale = scale8(largest_of_lanes(largest)), inverse = inverse8(scale);
  for_lanes([&](int lane) {
    BK_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      Four& x = state[r][lane];
      BK_UNROLL
      for (int k = 0; k < kRun; ++k) x.w[k] = encode8(as_float(x.w[k]), sign, inverse);
      put<1>(x, t.state[j], b, start_of(lane, r));
    }
    if (lane == 0) global(t.scale[j])[b.at / kStateBlock] = scale;
  });
}

// One block of a step, or with kMeasure of LAMB's first pass, which leaves the parameter and adds the squares of
// parameter and direction to `sums`.
template <Algorithm A, bool kMeasure>
BK_DEVICE void step_block(const OptimizerTensor& t, const OptimizerGrad& grad, const OptimizerScalars& s,
                          const Block& b, PerLane<double>* sums) {
  constexpr int kCount = states_of<A>();
  // LAMB's second pass has the gradient in the states already, and leaves them.
  constexpr bool kSecond = A == Algorithm::lamb && !kMeasure;
  constexpr bool kReadsParam = A != Algorithm::muon;  // which makes something else in its place
  PerLane<Four> p[kRuns], g[kRuns], rest[kRuns], state[kCount][kRuns];
  PerLane<uint32_t> largest[kCount] = {};
  float scale[kCount] = {};

  forget();
  for_lanes([&](int lane) {
    BK_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      const int i = start_of(lane, r);
      if (kReadsParam) fetch(p[r][lane], t.param, (Type)t.param_type, b, i);
      if (!kSecond) fetch(g[r][lane], grad.data, (Type)grad.type, b, i);
      if (kReadsParam && t.remainder) fetch<2>(rest[r][lane], t.remainder, b, i);
      BK_UNROLL
      for (int j = 0; j < kCount; ++j)
        if (t.state[j]) fetch(state[j][r][lane], t.state[j], (StateType)t.state_type, b, i);
    }
    BK_UNROLL
    for (int j = 0; j < kCount; ++j)
      if (t.scale[j]) scale[j] = global(t.scale[j])[b.at / kStateBlock];
  });

  // One run after the other: fewer registers.
  for_lanes([&](int lane) {
    BK_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      forget();
      const int i = start_of(lane, r);
      Four &mine = p[r][lane], &slope = g[r][lane];
      if (kReadsParam)
        open_param(t, mine, rest[r][lane]);
      else
        mine = {};
      if (!kSecond) to_floats(slope, (Type)grad.type);
      BK_UNROLL
      for (int j = 0; j < kCount; ++j) {
        if (!t.state[j]) continue;
        if ((StateType)t.state_type == StateType::int8)
          codes_to_floats(state[j][r][lane], has_sign<A>(j), scale[j]);
        else if ((StateType)t.state_type == StateType::bf16)
          to_floats(state[j][r][lane], Type::bf16);
      }

      float squares[2] = {};
      BK_UNROLL
      for (int k = 0; k < kRun; ++k) {
        float x[kStates] = {};
        BK_UNROLL
        for (int j = 0; j < kCount; ++j) x[j] = t.state[j] ? as_float(state[j][r][lane].w[k]) : 0.0f;
        const float before = as_float(mine.w[k]), gradient = kSecond ? 0.0f : as_float(slope.w[k]);
        if constexpr (kMeasure) {
          const float u = Update<A>::template measure<SingleMath>(s, before, gradient, x[0], x[1]);
          // What lies beyond the end is 0 / 0 where eps is 0.
          if (i + k < b.n) squares[0] += before * before, squares[1] += u * u;
        } else {
          mine.w[k] = as_bits(Update<A>::template apply<SingleMath>(s, before, gradient, x[0], x[1], x[2]));
        }
        BK_UNROLL
        for (int j = 0; j < kCount; ++j) state[j][r][lane].w[k] = as_bits(x[j]);
      }

      if constexpr (kMeasure) {
        sums[0][lane] += (double)squares[0], sums[1][lane] += (double)squares[1];
      } else {
        close_param(t, s, b, i, mine);
        if (t.ema) average(t, s, b, i, mine);
      }
      if constexpr (!kSecond) {
        BK_UNROLL
        for (int j = 0; j < kCount; ++j)
          if (t.state[j]) close_state(t, j, b, i, state[j][r][lane], largest[j][lane]);
      }
    }
  });

  if constexpr (!kSecond) {
    if ((StateType)t.state_type != StateType::int8) return;
    BK_UNROLL
    for (int j = 0; j < kCount; ++j)
      if (t.state[j]) close_codes(t, j, has_sign<A>(j), b, state[j], largest[j]);
  }
}

// The larger one; NaN wins.
BK_DEVICE double larger(double a, double b) { return b > a || b != b ? b : a; }

BK_DEVICE void norm_block(const OptimizerGrad& grad, const Block& b, bool infinity, PerLane<double>& total) {
  for_lanes([&](int lane) {
    Four g[kRuns];
    BK_UNROLL
    for (int r = 0; r < kRuns; ++r) fetch(g[r], grad.data, (Type)grad.type, b, start_of(lane, r));
    float squares = 0.0f;
    uint32_t most = 0;
    BK_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      to_floats(g[r], (Type)grad.type);
      BK_UNROLL
      for (int k = 0; k < kRun; ++k) {
        const uint32_t bits = g[r].w[k] & 0x7fffffffu;
        most = bits > most ? bits : most;  // as integers, so that infinity and NaN win
        squares += as_float(g[r].w[k]) * as_float(g[r].w[k]);
      }
    }
    total[lane] = infinity ? larger(total[lane], (double)as_float(most)) : total[lane] + (double)squares;
  });
}

// f(block) for the blocks of a chunk that one of `workers` has.
template <class F>
BK_DEVICE void for_blocks(const OptimizerChunk& chunk, int worker, int workers, const F& f) {
  const int64_t step = kStateBlock * workers;
  for (int64_t at = chunk.begin + kStateBlock * worker; at < chunk.end; at += step) {
    const int64_t left = chunk.end - at;
    f(Block{at, (int)(left < kStateBlock ? left : kStateBlock)});
  }
}

// ---- before and after -----------------------------------------------------------------------------------------------

BK_DEVICE double value_of(const Scalar& s) { return s.is_double ? *(const double*)s.value : *(const float*)s.value; }
BK_DEVICE bool found_inf(const OptimizerFactors& f) { return f.found_inf.value && value_of(f.found_inf) != 0.0; }

// As csrc/cpu/ops/optimizer.cpp has it.
BK_DEVICE double grad_factor(const OptimizerFactors& f) {
  double factor = 1.0;
  if (f.grad_scale.value) factor /= value_of(f.grad_scale);
  if (f.divisor.value) factor /= value_of(f.divisor);
  if (f.norm.value) {
    const float clip = (float)f.max_norm / ((float)value_of(f.norm) + 1e-6f);
    factor *= clip > 1.0f ? 1.0f : clip;
  }
  return factor;
}

// Counts the step of tensor i and writes its scalars. `first`: this is the first pass, or the only one.
BK_DEVICE void prepare(Algorithm algorithm, const OptimizerLists& lists, const OptimizerFactors& factors,
                       const float* trust, bool first, int64_t i, OptimizerScalars* scalars) {
  if (!lists.grads[i].data || found_inf(factors)) return;
  const OptimizerTensor& t = lists.tensors[i];
  const double step = *t.step + (first ? 1.0 : 0.0);
  if (first) *t.step = step;
  OptimizerScalars s = scalars_of(algorithm, lists.groups[t.group], step, grad_factor(factors));
  if (trust) s.trust = trust[i];
  scalars[i] = s;
}

// The number of the first chunk of tensor `tensor` or of one after it.
BK_DEVICE int64_t first_chunk(const OptimizerLists& lists, int64_t tensor) {
  int64_t low = 0, high = lists.chunk_count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (lists.chunks[middle].tensor < tensor)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// A tensor's total of `columns` values from each of its chunks' `parts`, added up in an order that is always the same.
BK_DEVICE void total(const OptimizerLists& lists, int64_t tensor, const double* values, int parts, int columns,
                     bool infinity, double* out) {
  const int64_t begin = first_chunk(lists, tensor) * parts, end = first_chunk(lists, tensor + 1) * parts;
  for (int column = 0; column < columns; ++column) {
    PerLane<double> mine;
    for_lanes([&](int lane) {
      double sum = 0.0;
      for (int64_t i = begin + lane; i < end; i += kLanes) {
        const double value = values[i * columns + column];
        sum = infinity ? larger(sum, value) : sum + value;
      }
      mine[lane] = sum;
    });
    const double all = over_lanes(mine, [infinity](double a, double b) { return infinity ? larger(a, b) : a + b; });
    for_lanes([&](int lane) {
      if (lane == 0) out[tensor * columns + column] = all;
    });
  }
}

}  // namespace
}  // namespace cuda
}  // namespace bigkernels
