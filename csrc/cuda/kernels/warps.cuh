// A thread block of kWarps warps, and the instructions of one that are not C++: as lanes.cuh, the same source on a GPU
// and in a host build. There warps run one after the other, in either order, with a barrier after each `phase`; copies
// to shared memory arrive when they are waited for and not before (or at once, which the tests try too, because a copy
// may come early as well as late); and shared memory begins as NaN.
#pragma once
#include "halves.cuh"

#if !defined(__CUDACC__)
#include <string.h>

#include <vector>
#endif

namespace bigkernels {
namespace {

#if defined(__CUDACC__)
#define BK_HOT BK_DEVICE
#else
// What takes the time of a host build, which is not optimised otherwise.
#define BK_HOT __attribute__((optimize("O3"))) BK_DEVICE
struct Pending {
  void* to;
  const void* from;
  int bytes;  // of 16; the others become zero
};
struct Host {
  bool reversed = false, early = false;
  int warp = 0;
  std::vector<std::vector<std::vector<Pending> > >
      groups;  // of each warp, in the order of their commits; the last is open
};
static Host host;

static inline void arrive(const Pending& p) {
  memset(p.to, 0, 16);
  if (p.bytes) memcpy(p.to, p.from, (size_t)p.bytes);
}
#endif

template <class T, int kWarps>
struct PerWarp {
#if defined(__CUDACC__)
  T own;
  BK_METHOD T& operator[](int) { return own; }
#else
  T all[kWarps];
  BK_METHOD T& operator[](int warp) { return all[warp]; }
#endif
};

// f of all warps.
template <int kWarps, class F>
BK_DEVICE void each_warp(const F& f) {
#if defined(__CUDACC__)
  f((int)(threadIdx.x / kLanes));
#else
  if (host.groups.size() != (size_t)kWarps) host.groups.assign(kWarps, {{}});
  for (int i = 0; i < kWarps; ++i) f(host.warp = host.reversed ? kWarps - 1 - i : i);
#endif
}

// The same, then a barrier: what a warp gives to others it gives to those of a later phase.
template <int kWarps, class F>
BK_DEVICE void phase(const F& f) {
  each_warp<kWarps>(f);
#if defined(__CUDACC__)
  __syncthreads();
#endif
}

// ---- copies to shared memory ----------------------------------------------------------------------------------------

// 16 bytes, of which `bytes` (0 or 16) are read and the others are zero; of 0 the address may be anywhere. Both are
// multiples of 16.
BK_DEVICE void copy16(char* shared, const char* from, int bytes) {
#if !defined(__CUDACC__)
  const Pending copy{shared, from, bytes};
  if (host.early) arrive(copy);
  host.groups[host.warp].back().push_back(copy);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
#endif
}

// The same for a warp's run of kPieces: a lane's lie 32 of them apart, `shared` and `from` are of its first.
// The offsets are in the instructions, where the compiler would add each to both addresses.
template <int kPieces, int kAt = 0>
BK_DEVICE void copy_pieces(char* shared, const char* from, int bytes, int lane) {
  if constexpr (kAt < kPieces) {
    if (kAt + kLanes <= kPieces || lane < kPieces - kAt) {
#if !defined(__CUDACC__)
      copy16(shared + kAt * 16, from + kAt * 16, bytes);
#elif __CUDA_ARCH__ >= 800
      asm volatile(
          "cp.async.cg.shared.global [%0 + %2], [%1 + %2], 16, %3;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
          "l"(__cvta_generic_to_global(from)), "n"(kAt * 16), "r"(bytes)
          : "memory");
#endif
    }
    copy_pieces<kPieces, kAt + kLanes>(shared, from, bytes, lane);
  }
}

// Ends a group of a warp's copies.
BK_DEVICE void commit() {
#if !defined(__CUDACC__)
  host.groups[host.warp].push_back({});
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the last kLeft groups of this warp have arrived.
template <int kLeft>
BK_DEVICE void arrived() {
#if !defined(__CUDACC__)
  auto& groups = host.groups[host.warp];
  while (groups.size() > kLeft + 1u) {
    if (!host.early)
      for (const Pending& p : groups.front()) arrive(p);
    groups.erase(groups.begin());
  }
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// ---- matrices -------------------------------------------------------------------------------------------------------

template <class T, int kCount>
struct Few {
  T v[kCount];
};
typedef Few<uint32_t, 2> Words2;
typedef Few<uint32_t, 4> Words4;
typedef Few<float, 4> Floats4;

struct alignas(8) Pair {
  uint32_t w[2];
};
struct alignas(16) Quad {
  uint32_t w[4];
};

// Four matrices of 8 x 8 halves: lane i has the address of row i % 8 of matrix i / 8 (ldmatrix).
BK_DEVICE void load_matrices(PerLane<Words4>& out, PerLane<const char*>& rows) {
#if !defined(__CUDACC__)
  for (int lane = 0; lane < kLanes; ++lane)
    for (int m = 0; m < 4; ++m) memcpy(&out[lane].v[m], rows[8 * m + lane / 4] + lane % 4 * 4, 4);
#elif __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.own.v[0]), "=r"(out.own.v[1]), "=r"(out.own.v[2]), "=r"(out.own.v[3])
               : "r"((uint32_t)__cvta_generic_to_shared(rows.own)));
#endif
}

// A matrix of 8 x 8 halves transposed: lane i has of row i / 4 halves 2 * (i % 4) and the next (movmatrix).
BK_DEVICE void transpose_matrix(PerLane<uint32_t>& m) {
#if !defined(__CUDACC__)
  const PerLane<uint32_t> before = m;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int column = lane / 4, row = lane % 4 * 2;
    uint32_t halves[2];
    for (int i = 0; i < 2; ++i) halves[i] = before.all[(row + i) * 4 + column / 2] >> column % 2 * 16 & 0xffff;
    m[lane] = halves[0] | halves[1] << 16;
  }
#elif __CUDA_ARCH__ >= 800
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(m.own) : "r"(m.own));
#endif
}

// d (16, 8) = a (16, 16) b (16, 8) + d, or without d where it is the `first` (mma.m16n8k16). A lane has of a rows
// lane / 4 and 8 more, of b and d column lane / 4 and columns 2 * (lane % 4) and the next.
template <Type kType>
BK_HOT void multiply_add(PerLane<Floats4>& d, PerLane<Words4>& a, PerLane<Words2>& b, bool first) {
#if !defined(__CUDACC__)
  float x[16][16], y[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r)
        x[g + 8 * (r & 1)][t + 8 * (r >> 1) + i] = widen(a[lane].v[r] >> 16 * i & 0xffff, kType);
      for (int r = 0; r < 2; ++r) y[t + 8 * r + i][g] = widen(b[lane].v[r] >> 16 * i & 0xffff, kType);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + 8 * (r >> 1), column = lane % 4 * 2 + (r & 1);
      float sum = first ? 0.0f : d[lane].v[r];
      for (int k = 0; k < 16; ++k) sum += x[row][k] * y[k][column];
      d[lane].v[r] = sum;
    }
#elif __CUDA_ARCH__ >= 800
  const float z[4] = {first ? 0.0f : d.own.v[0], first ? 0.0f : d.own.v[1], first ? 0.0f : d.own.v[2],
                      first ? 0.0f : d.own.v[3]};
#define BK_MMA(type)                                                                                          \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                  \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                                                   \
      "{%10, %11, %12, %13};"                                                                                 \
      : "=f"(d.own.v[0]), "=f"(d.own.v[1]), "=f"(d.own.v[2]), "=f"(d.own.v[3])                                \
      : "r"(a.own.v[0]), "r"(a.own.v[1]), "r"(a.own.v[2]), "r"(a.own.v[3]), "r"(b.own.v[0]), "r"(b.own.v[1]), \
        "f"(z[0]), "f"(z[1]), "f"(z[2]), "f"(z[3]))
  if constexpr (kType == Type::bf16)
    BK_MMA("bf16");
  else
    BK_MMA("f16");
#undef BK_MMA
#endif
}

// a * b + c of both halves.
template <Type kType>
BK_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
#if !defined(__CUDACC__)
  uint32_t out = 0;
  for (int s = 0; s < 32; s += 16) {
    const float value =
        __builtin_fmaf(widen(a >> s & 0xffff, kType), widen(b >> s & 0xffff, kType), widen(c >> s & 0xffff, kType));
    out |= (kType == Type::bf16 ? nearest_bf16(value) : nearest_f16(value)) << s;
  }
  return out;
#else
  uint32_t out = 0;
#if __CUDA_ARCH__ >= 800
  if constexpr (kType == Type::bf16)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
#endif
  return out;
#endif
}

// Two numbers as halves, the first in the low one.
template <Type kType>
BK_DEVICE uint32_t pack2(float low, float high) {
#if !defined(__CUDACC__)
  const auto nearest = kType == Type::bf16 ? nearest_bf16 : nearest_f16;
  return nearest(low) | nearest(high) << 16;
#else
  uint32_t out = 0;
#if __CUDA_ARCH__ >= 800
  if constexpr (kType == Type::bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#endif
  return out;
#endif
}

// (a & b) | c, and of a where `mask` is set, else of b: left to itself the compiler takes two instructions where two of
// three are constant.
BK_DEVICE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
#else
  return (a & b) | c;
#endif
}
BK_DEVICE uint32_t choose(uint32_t mask, uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(out) : "r"(mask), "r"(a), "r"(b));
  return out;
#else
  return (mask & a) | (~mask & b);
#endif
}

// Bytes i and i + 2 of a word, each as a half.
BK_DEVICE uint32_t wide_bytes(uint32_t word, int i) {
#if defined(__CUDACC__)
  return __byte_perm(word, 0, i ? 0x4341 : 0x4240);
#else
  return word >> 8 * i & 0x00ff00ff;
#endif
}

// Byte i of two words, side by side; in the second they are below 128.
BK_DEVICE uint32_t two_bytes(uint32_t low, uint32_t high, int i) {
#if defined(__CUDACC__)
  uint32_t out;  // the places above have the sign of a byte of the second
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(0xcc00 | (4 + i) << 4 | i));
  return out;
#else
  return (low >> 8 * i & 0xff) | (high >> 8 * i & 0xff) << 8;
#endif
}

// A number that the compiler does not look into.
BK_DEVICE uint32_t opaque(uint32_t x) {
#if defined(__CUDACC__)
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
#endif
  return x;
}

// A place in shared memory for tables, whose contents stay.
#if defined(__CUDACC__)
typedef uint32_t SharedPlace;
BK_DEVICE SharedPlace place_of(const char* shared) { return (uint32_t)__cvta_generic_to_shared(shared); }
BK_DEVICE uint32_t read_shared(SharedPlace place, uint32_t offset) {
  uint32_t x;
  asm("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(place + offset));
  return x;
}
#else
typedef const char* SharedPlace;
BK_DEVICE SharedPlace place_of(const char* shared) { return shared; }
BK_DEVICE uint32_t read_shared(SharedPlace place, uint32_t offset) { return *(const uint32_t*)(place + offset); }
#endif

// A float16 as a float.
BK_DEVICE float half_to_float(uint32_t half) {
#if defined(__CUDACC__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((uint16_t)half));
  return x;
#else
  return widen_f16(half & 0xffff);
#endif
}

// ---- between thread blocks ------------------------------------------------------------------------------------------

// What this thread has written is there for every other thread that learns of it.
BK_DEVICE void publish() {
#if defined(__CUDACC__)
  __threadfence();
#endif
}

// How often it was called for this counter before.
BK_DEVICE int count(int* counter) {
#if defined(__CUDACC__)
  return atomicAdd(counter, 1);
#else
  return (*counter)++;
#endif
}

// What another thread block has written.
BK_DEVICE Floats4 read_published(const Floats4* p) {
#if defined(__CUDACC__)
  const float4 x = __ldcg((const float4*)p);
  return {{x.x, x.y, x.z, x.w}};
#else
  return *p;
#endif
}

}  // namespace
}  // namespace bigkernels
