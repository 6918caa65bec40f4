// Register-only multiply-add loops: the most that this level's matrix or vector units can do, for the benchmark engine.
#include <bigkernels/vec.h>

namespace bigkernels {
namespace BK_ISA {
namespace {

#if defined(__AMX_BF16__)
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {};
  uint8_t rows[16] = {};
};

// Four accumulators, two operand tiles of each side: the shape of a blocked product's inner loop.
template <bool kInt8>
int64_t tiles(int64_t rounds) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.columns[i] = 64, config.rows[i] = 16;
  alignas(64) uint8_t zero[1024] = {};
  _tile_loadconfig(&config);
  _tile_loadd(4, zero, 64);
  _tile_loadd(5, zero, 64);
  _tile_loadd(6, zero, 64);
  _tile_loadd(7, zero, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < rounds; ++i) {
    if (kInt8) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, zero, 64);
  _tile_release();
  return rounds * 4 * 2 * 16 * 16 * (kInt8 ? 64 : 32);
}
#endif

constexpr int kAccumulators = 10;  // latency x units of a multiply-add, with room

template <class Step>
BK_INLINE void repeat(int64_t rounds, vf* acc, Step step) {
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 10
    for (int u = 0; u < kAccumulators; ++u) {
      step(acc[u]);
      asm volatile("" : "+x"(acc[u]));  // keeps the loop from being folded
    }
  }
}

}  // namespace

// type: 0 float32, 1 bfloat16, 2 int8. Returns the operations done (a multiply-add is two), 0 where there is no such
// unit.
int64_t matrix_loop(int type, int64_t rounds) {
#if defined(__AMX_BF16__)
  if (type == 1) return tiles<false>(rounds);
  if (type == 2) return tiles<true>(rounds);
#endif
  vf acc[kAccumulators] = {};
  vf a = splat(1.0f), b = splat(1e-9f);
  asm volatile("" : "+x"(a), "+x"(b));
  if (type == 0) {
    repeat(rounds, acc, [&](vf& v) { v = v * a + b; });
    return rounds * kAccumulators * W * 2;
  }
#if defined(__AVX512BF16__)
  if (type == 1) {
    repeat(rounds, acc, [&](vf& v) { v = (vf)_mm512_dpbf16_ps((__m512)v, (__m512bh)a, (__m512bh)b); });
    return rounds * kAccumulators * W * 4;
  }
#endif
#if defined(__AVX512VNNI__)
  if (type == 2) {
    repeat(rounds, acc, [&](vf& v) { v = (vf)_mm512_dpbusd_epi32((__m512i)v, (__m512i)a, (__m512i)b); });
    return rounds * kAccumulators * W * 8;
  }
#endif
  return 0;
}

}  // namespace BK_ISA
}  // namespace bigkernels
