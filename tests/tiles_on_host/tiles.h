// The tile instructions in plain C++, so that code for tile units runs on a machine that has none: included before
// everything else in a build of the amx level (CMakeLists.txt, bigkernels_cpu_tiles). Arithmetic and faults are those
// of Intel's manual (volume 2, TDPBF16PS, TDPBSSD, LDTILECFG): what the hardware refuses ends the process.
//
// A translation unit has tiles of its own: shapes are set, used and given back within one.
#pragma once
#include <immintrin.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig host_tiles::load_config
#define _tile_release host_tiles::release
#define _tile_loadd host_tiles::load
#define _tile_stream_loadd host_tiles::load
#define _tile_stored host_tiles::store
#define _tile_zero host_tiles::zero
#define _tile_dpbf16ps host_tiles::multiply_bf16
#define _tile_dpbssd host_tiles::multiply_int8

namespace {
namespace host_tiles {

constexpr int kTiles = 8, kRows = 16, kBytes = 64;

struct State {
  bool configured;
  int rows[kTiles], bytes[kTiles];
  alignas(64) uint8_t data[kTiles][kRows][kBytes];
};
thread_local State state;

__attribute__((noinline, cold, noreturn, unused)) void fault(const char* what) {
  fprintf(stderr, "tiles_on_host: %s\n", what);
  abort();
}
inline void check(bool right, const char* what) {
  if (!right) fault(what);
}
inline void check_tile(int t) {
  check(state.configured, "a tile is used before its shape is set");
  check(t >= 0 && t < kTiles && state.rows[t] > 0, "a tile without a shape");
}

inline void load_config(const void* from) {
  const uint8_t* c = (const uint8_t*)from;
  check(c[0] == 1 && c[1] == 0, "palette 1 from row 0 is all that kernels ask for");
  for (int i = 2; i < 16; ++i) check(c[i] == 0, "a reserved byte of the shapes is not zero");
  for (int t = 0; t < kTiles; ++t) {
    uint16_t bytes;
    memcpy(&bytes, c + 16 + 2 * t, 2);
    check(bytes <= kBytes && c[48 + t] <= kRows && !bytes == !c[48 + t], "a tile's shape is not one");
    state.bytes[t] = bytes, state.rows[t] = c[48 + t];
  }
  memset(state.data, 0, sizeof state.data);
  state.configured = true;
}
inline void release() { memset(&state, 0, sizeof state); }

inline void zero(int t) {
  check_tile(t);
  memset(state.data[t], 0, sizeof state.data[t]);
}
inline void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int r = 0; r < state.rows[t]; ++r) memcpy(state.data[t][r], (const char*)from + r * stride, state.bytes[t]);
}
inline void store(int t, void* to, int64_t stride) {
  check_tile(t);
  for (int r = 0; r < state.rows[t]; ++r) memcpy((char*)to + r * stride, state.data[t][r], state.bytes[t]);
}

inline void check_product(int c, int a, int b) {
  check_tile(c), check_tile(a), check_tile(b);
  check(c != a && c != b && a != b, "a product of fewer than three tiles");
  check(state.rows[c] == state.rows[a] && state.bytes[c] == state.bytes[b] && state.bytes[a] == 4 * state.rows[b] &&
            state.bytes[c] % 4 == 0,
        "the shapes of a product do not fit");
}

// Numbers below float32's normal ones are zero, as operands and as results.
typedef float Line __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
inline Line normal(Line x) {
  const Ints bits = (Ints)x, subnormal = (bits & 0x7f800000) == 0;
  return (Line)(bits & (~subnormal | (int32_t)0x80000000));
}
inline Line line(const void* from) {
  Line x;
  memcpy(&x, from, sizeof x);
  return x;
}

// Even and odd elements of the depth are summed apart, by fused multiply-adds, and then added to what is there.
inline void multiply_bf16(int c, int a, int b) {
  check_product(c, a, b);
  for (int m = 0; m < state.rows[c]; ++m) {
    Line even{}, odd{};
    for (int k = 0; k < state.rows[b]; ++k) {
      uint32_t pair;
      memcpy(&pair, state.data[a][m] + 4 * k, 4);
      const Ints left = Ints{} + (int32_t)pair, right = (Ints)line(state.data[b][k]);
      const Line x = normal((Line)(left << 16)), y = normal((Line)(left & (int32_t)0xffff0000));
      const Line u = normal((Line)(right << 16)), v = normal((Line)(right & (int32_t)0xffff0000));
      for (int n = 0; n < kBytes / 4; ++n) even[n] = __builtin_fmaf(x[n], u[n], even[n]);
      for (int n = 0; n < kBytes / 4; ++n) odd[n] = __builtin_fmaf(y[n], v[n], odd[n]);
      even = normal(even), odd = normal(odd);
    }
    const Line sum = normal(normal(line(state.data[c][m])) + normal(even + odd));
    memcpy(state.data[c][m], &sum, state.bytes[c]);
  }
}

inline void multiply_int8(int c, int a, int b) {
  check_product(c, a, b);
  for (int m = 0; m < state.rows[c]; ++m) {
    Ints sum = (Ints)line(state.data[c][m]);
    for (int k = 0; k < state.rows[b]; ++k) {
      const Ints right = (Ints)line(state.data[b][k]);
      for (int i = 0; i < 4; ++i) sum += (right << (24 - 8 * i) >> 24) * (int8_t)state.data[a][m][4 * k + i];
    }
    memcpy(state.data[c][m], &sum, state.bytes[c]);
  }
}

}  // namespace host_tiles
}  // namespace
