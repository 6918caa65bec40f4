// A warp's part of gradient @ weight, from the same copy of the weight: codes are transposed, a word of them at a time,
// before they are decoded. Scales of groups then change along the depth, so that it is gradients which are multiplied
// with them, and offsets are one more product for all columns of a group, with two halves for each number.
#pragma once
#include "few_shape.cuh"

namespace bigkernels {
namespace cuda {
namespace {

template <class K>
struct Backward {
  typedef Parts<K> S;
  typedef Offsets<K::kCode, K::kOffset> O;
  static constexpr bool kOffset = O::kA || O::kB;
  static constexpr int kColumns = K::kColumns;
  static constexpr int kGroupTiles = K::kGroup && K::kGroup / 16 < S::kTiles ? K::kGroup / 16 : S::kTiles;
  static constexpr int kGroups = S::kTiles / kGroupTiles;  // of a warp
  static constexpr int kWords = S::kTiles * 4 / K::kPerQuad;

  struct Corrections {
    PerLane<Floats4> at[kGroups][kColumns];
  };
  PerWarp<PerLane<int>, S::kWarps> matrix;
  PerWarp<Corrections, S::kWarps> corrections;
  float inverse;  // of what scales of groups are divided by

  BK_METHOD void prepare(const FewProduct& p, int warp) {
    if (K::kType == Type::bf16)
      inverse = as_float(kLift<K::kCode, K::kType> << 16 | (kLift<K::kCode, K::kType> ? 0 : 0x3f800000u));
    else
      inverse = p.top ? 1.0f / *p.top : 1.0f;
    for_lanes([&](int lane) { matrix[warp][lane] = matrix_place<K>(warp, lane); });
  }
  BK_METHOD void begin(int warp) {
    if constexpr (kOffset) {
      BK_UNROLL
      for (int g = 0; g < kGroups; ++g) BK_UNROLL
      for (int c = 0; c < kColumns; ++c) for_lanes([&](int lane) { corrections[warp].at[g][c][lane] = {}; });
    }
  }

  BK_METHOD static int64_t place(const Line& line, int warp, int tile) {
    return ((int64_t)(warp / S::kDown) * line.runs + tile) * (4 * K::kUnit) + warp % S::kDown * S::kCopied * K::kUnit;
  }
  BK_METHOD static int64_t next(const Line& line) { return (int64_t)line.runs * (S::kAlong * 4 * K::kUnit); }
  BK_METHOD static int steps(const FewProduct& p, const Line&, int warp, int) {
    return ((p.n + kFour - 1) / kFour - warp / S::kDown + S::kAlong - 1) / S::kAlong;
  }

  BK_METHOD void compute(int warp, const char* tokens, const char* stage, const char* table, Sums<K>& acc) {
    const char* four = stage + warp / S::kDown * (4 * K::kUnit);
    const int down = warp % S::kDown;
    PerLane<const char*> codes, scales;
    PerLane<Table> entries;
    for_lanes([&](int lane) {
      constexpr int kEach = 16 / K::kPerQuad;  // bytes of a lane's in a step
      const int first = down * S::kTiles;
      codes[lane] = four + lane * 16 + first / K::kPerQuad * (kLanes * 16) + first % K::kPerQuad * kEach;
      if constexpr (K::kGroup != 0)
        scales[lane] =
            four + code_bytes(K::kCode) + lane % 4 * (2 * 8 * groups_of(K::kGroup)) + first * 16 / K::kGroup * 8;
      entries[lane] = {place_of(table), (uint32_t)lane * 0x04040404u};
    });
    BK_UNROLL
    for (int s = 0; s < kFour / 16; s += 2) {
      PerLane<Words4> x[kColumns];
      load_tokens<K>(x, tokens, matrix[warp], s / 2);
      BK_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        const int unit = (s + odd) * K::kUnit;
        PerLane<Few<uint32_t, kWords>> words;
        for_lanes([&](int lane) { load_words(words[lane], codes[lane] + unit); });
        transpose<K::kCode, K::kType>(words);
        BK_UNROLL
        for (int g = 0; g < kGroups; ++g) {
          PerLane<Words2> b[kColumns];
          gradients(warp, g, odd, scales, unit, x, b);
          BK_UNROLL
          for (int i = 0; i < kGroupTiles; ++i) {
            const int u = g * kGroupTiles + i;
            PerLane<Words4> a;
            for_lanes([&](int lane) {
              a[lane] = decode_transposed<K::kCode, K::kType>(words[lane].v + u * (4 / K::kPerQuad), entries[lane]);
            });
            BK_UNROLL
            for (int c = 0; c < kColumns; ++c) multiply_add<K::kType>(acc.at[u][c], a, b[c], false);
          }
        }
      }
    }
  }

  BK_METHOD static void load_words(Few<uint32_t, kWords>& to, const char* from) {
    if constexpr (kWords < 4) {
      const Pair pair = *(const Pair*)from;
      BK_UNROLL
      for (int i = 0; i < 2; ++i) to.v[i] = pair.w[i];
    } else {
      BK_UNROLL
      for (int q = 0; q < kWords / 4; ++q) {
        const Quad quad = *(const Quad*)(from + q * (kLanes * 16));
        BK_UNROLL
        for (int i = 0; i < 4; ++i) to.v[4 * q + i] = quad.w[i];
      }
    }
  }

  // The gradients of a step's 16 rows, multiplied with their scales of a group, and what its offsets add.
  BK_METHOD void gradients(int warp, int group, int odd, PerLane<const char*>& scales, int unit, PerLane<Words4>* x,
                           PerLane<Words2>* b) {
    constexpr Type kType = K::kType;
    PerLane<Words4> offset;  // rows g: the number, rows g + 8: what rounding took from it
    PerLane<Words2> scale;
    const auto split = [&](int lane, int h, float first, float second) {
      Words4& to = offset[lane];
      to.v[2 * h] = pack2<kType>(first, second);
      // float16 is what these numbers are stored in.
      to.v[2 * h + 1] = kType == Type::f16 ? 0
                                           : pack2<kType>(first - as_float(to.v[2 * h] << 16),
                                                          second - as_float(to.v[2 * h] & 0xffff0000u));
    };
    for_lanes([&](int lane) {
      if constexpr (K::kGroup != 0) {
        Pair w[2];  // of rows 2 * (lane % 4) and the next: each with that 8 further
        BK_UNROLL
        for (int r = 0; r < 2; ++r)
          w[r] = *(const Pair*)(scales[lane] + unit + r * 8 * groups_of(K::kGroup) + group * 8);
        BK_UNROLL
        for (int h = 0; h < 2; ++h) {
          const GroupScale first = group_scale<K::kCode, K::kOffset>(w[0].w[h]),
                           second = group_scale<K::kCode, K::kOffset>(w[1].w[h]);
          scale[lane].v[h] = pack2<kType>(first.scale * inverse, second.scale * inverse);
          if constexpr (K::kOffset == FewOffset::zero) split(lane, h, first.a, second.a);
          if constexpr (K::kOffset == FewOffset::minimum) split(lane, h, first.b * inverse, second.b * inverse);
        }
      }
      if constexpr (O::kA && K::kOffset == FewOffset::none) {
        const uint32_t added = pack2<kType>(-kAdded<K::kCode>, -kAdded<K::kCode>);
        offset[lane] = {{added, 0, added, 0}};
      }
    });
    BK_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      for_lanes([&](int lane) {
        if constexpr (K::kGroup != 0) {
          BK_UNROLL
          for (int h = 0; h < 2; ++h) b[c][lane].v[h] = x[c][lane].v[2 * odd + h];
        } else {
          b[c][lane] = half_of<K>(x[c][lane], odd);
        }
      });
      if constexpr (O::kB) multiply_add<kType>(corrections[warp].at[group][c], offset, b[c], false);
      if constexpr (K::kGroup != 0)
        for_lanes([&](int lane) {
          BK_UNROLL
          for (int h = 0; h < 2; ++h) b[c][lane].v[h] = fma2<kType>(b[c][lane].v[h], scale[lane].v[h], both(0x8000));
        });
      if constexpr (O::kA) multiply_add<kType>(corrections[warp].at[group][c], offset, b[c], false);
    }
  }

  BK_METHOD void end(int warp, int, Sums<K>& acc) {
    if constexpr (kOffset)
      each_sum<K>(acc, [&](int i, int u, int c, Floats4& value) {
        const Floats4& other = corrections[warp].at[u / kGroupTiles][c][i % kLanes];
        BK_UNROLL
        for (int r = 0; r < 4; ++r) value.v[r] += kOne<K::kType> * (other.v[r % 2] + other.v[2 + r % 2]);
      });
  }

  BK_METHOD static void write(const FewProduct& p, int tile, int u, int c, int lane, const Floats4& value) {
    float factor = kMend<K::kCode, K::kType>;
    if (K::kType == Type::f16 && p.top) factor *= *p.top;
    BK_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int k = tile * S::kTileRows + u * 16 + transposed_row<K::kCode>(lane / 4, h);
      if (k >= p.k) continue;
      BK_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int m = c * 8 + lane % 4 * 2 + r;
        if (m < p.m) store<K::kType>(p, (int64_t)m * p.k + k, value.v[2 * h + r] * factor);
      }
    }
  }
};

}  // namespace
}  // namespace cuda
}  // namespace bigkernels
