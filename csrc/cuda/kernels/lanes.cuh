// A warp. On a GPU its 32 lanes run side by side, and what each of them has is in its registers. A host build, which
// the tests make where there is no GPU, runs the same source: lanes in turn, and what each of them has in an array. So
// a kernel is written as phases over all lanes, `for_lanes`, with what passes between lanes in between.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define BK_DEVICE static __device__ __forceinline__
#define BK_METHOD __device__ __forceinline__
#define BK_ANYWHERE __host__ __device__ __forceinline__
#define BK_UNROLL _Pragma("unroll")
#define BK_ROLL _Pragma("unroll 1")
#else
#define BK_DEVICE static inline __attribute__((unused))
#define BK_METHOD inline
#define BK_ANYWHERE inline
#define BK_UNROLL
#define BK_ROLL
#endif

namespace bigkernels {
namespace {

constexpr int kLanes = 32;

template <class T>
struct PerLane {
#if defined(__CUDACC__)
  T own;
  BK_METHOD T& operator[](int) { return own; }
#else
  T all[kLanes];
  BK_METHOD T& operator[](int lane) { return all[lane]; }
#endif
};

template <class F>
BK_DEVICE void for_lanes(const F& f) {
#if defined(__CUDACC__)
  f((int)(threadIdx.x % kLanes));
#else
  for (int lane = 0; lane < kLanes; ++lane) f(lane);
#endif
}

// A pointer that was itself read from memory could be to any kind of it, for all that the compiler knows.
template <class T>
BK_DEVICE T* global(T* p) {
#if defined(__CUDACC__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// What was read from memory before is read again where it is needed: that costs less than the registers to keep it in.
BK_DEVICE void forget() {
#if defined(__CUDACC__)
  asm volatile("" ::: "memory");
#endif
}

// f of all lanes, in an order that is always the same.
template <class T, class F>
BK_DEVICE T over_lanes(PerLane<T>& x, const F& f) {
  for (int distance = kLanes / 2; distance; distance /= 2) {
#if defined(__CUDACC__)
    x.own = f(x.own, __shfl_xor_sync(~0u, x.own, distance));
#else
    PerLane<T> before = x;
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = f(before[lane], before[lane ^ distance]);
#endif
  }
  return x[0];
}

BK_DEVICE uint32_t largest_of_lanes(PerLane<uint32_t>& x) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(~0u, x.own);
#else
  return over_lanes(x, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
#endif
}

}  // namespace
}  // namespace bigkernels
