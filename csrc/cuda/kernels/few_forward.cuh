// A warp's part of x @ weight^T. Rows of the weight are the rows of matrix fragments and tokens their columns, so that
// one instruction multiplies 16 x 16 weights with 8 tokens, and the scale of a row belongs to one lane's registers.
#pragma once
#include "few_shape.cuh"

namespace bigkernels {
namespace cuda {
namespace {

template <class K>
struct Forward {
  typedef Parts<K> S;
  typedef Offsets<K::kCode, K::kOffset> O;
  static constexpr bool kSum = O::kA || O::kB;
  static constexpr int kGroups = groups_of(K::kGroup), kColumns = K::kColumns;
  static constexpr int kGroupSteps = K::kGroup ? K::kGroup / 16 : kSteps;
  // With many columns and groups tokens that are loaded early would take registers that are not there: a loop over
  // groups.
  static constexpr bool kRolled =
      K::kGroup && K::kGroup < kRun && (kColumns == 8 || (kColumns == 4 && K::kGroup == 32 && kSum));
  static constexpr int kRolledSteps = kGroupSteps;
  static constexpr bool kSixteen = K::kCode == FewCode::int4;

  PerWarp<PerLane<int>, S::kWarps> matrix;
  PerWarp<PerLane<Words4>, S::kWarps> ones;
  PerWarp<PerLane<Floats4>[kSum && !K::kGroup ? kColumns : 1], S::kWarps> all;  // of tokens, where groups have no sums

  BK_METHOD void prepare(const FewProduct&, int warp) {
    for_lanes([&](int lane) {
      matrix[warp][lane] = matrix_place<K>(warp, lane);
      BK_UNROLL
      for (int r = 0; r < 4; ++r) ones[warp][lane].v[r] = opaque(both(kSixteen && r % 2 ? 16 : 1));
      if constexpr (S::kLiftCodes) ones[warp][lane] = lifted<K>(ones[warp][lane]);
    });
  }
  BK_METHOD void begin(int warp) {
    if constexpr (kSum && !K::kGroup) {
      BK_UNROLL
      for (int c = 0; c < kColumns; ++c) for_lanes([&](int lane) { all[warp][c][lane] = {}; });
    }
  }

  // Where the units of a row tile begin that a warp copies, how far on those of the next step are, and how many steps
  // have some.
  BK_METHOD static int64_t place(const Line& line, int warp, int tile) {
    const int first = (tile * S::kDown + warp % S::kDown) * S::kTiles;
    return ((int64_t)(first / 4) * line.runs + warp / S::kDown) * (4 * K::kUnit) + first % 4 * K::kUnit;
  }
  BK_METHOD static int64_t next(const Line&) { return S::kAlong * 4 * K::kUnit; }
  BK_METHOD static int steps(const FewProduct& p, const Line& line, int warp, int tile) {
    const bool inside = (tile * S::kDown + warp % S::kDown) * S::kTiles < (p.n + kFour - 1) / kFour * 4;
    return inside ? (line.runs - warp / S::kDown + S::kAlong - 1) / S::kAlong : 0;
  }

  BK_METHOD void compute(int warp, const char* tokens, const char* stage, const char* table, Sums<K>& acc) {
    const char* units = stage + warp * S::kCopied * K::kUnit;
    PerLane<const char*> codes, scales;
    PerLane<Table> entries;
    for_lanes([&](int lane) {
      codes[lane] = units + lane * 16;
      scales[lane] = units + code_bytes(K::kCode) + lane / 4 * (kGroups * 8);
      entries[lane] = {place_of(table), (uint32_t)lane * 0x04040404u};
    });
    PerLane<Quad> words[S::kTiles];
    PerLane<Few<uint32_t, 4>> scale[S::kTiles];  // of two groups
    PerLane<Floats4> product[S::kTiles][kColumns], sum[kColumns];
    const auto two_steps = [&](int from, int s) {  // `from`: whole groups and whole loads before
      BK_UNROLL
      for (int u = 0; u < S::kTiles; ++u)
        for_lanes([&](int lane) {
          const char* at = codes[lane] + u * K::kUnit + (from + s) / K::kPerQuad * (kLanes * 16);
          if (kRolled && K::kPerQuad == 4)
            *(Pair*)&words[u][lane] = *(const Pair*)(at + (from + s) % K::kPerQuad * 4);
          else if (s % K::kPerQuad == 0)
            words[u][lane] = *(const Quad*)at;
        });
      PerLane<Words4> x[kColumns];
      load_tokens<K>(x, tokens, matrix[warp], (from + s) / 2);
      BK_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        const int at = s + odd;
        const bool first = K::kGroup && at % kGroupSteps == 0;
        PerLane<Words2> b[kColumns];
        BK_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          for_lanes([&](int lane) { b[c][lane] = half_of<K>(x[c][lane], odd); });
          if constexpr (kSum) multiply_add<K::kType>(K::kGroup ? sum[c] : all[warp][c], ones[warp], b[c], first);
        }
        BK_UNROLL
        for (int u = 0; u < S::kTiles; ++u) {
          PerLane<Words4> a;
          for_lanes([&](int lane) {
            const int word = (kRolled ? odd : at % K::kPerQuad) * (4 / K::kPerQuad);
            a[lane] = decode<K::kCode, K::kType, kSixteen>(words[u][lane].w + word, entries[lane]);
            if constexpr (S::kLiftCodes) a[lane] = lifted<K>(a[lane]);
          });
          BK_UNROLL
          for (int c = 0; c < kColumns; ++c)
            multiply_add<K::kType>(K::kGroup ? product[u][c] : acc.at[u][c], a, b[c], first);
        }
        if constexpr (K::kGroup != 0) {
          if (at % kGroupSteps == kGroupSteps - 1)
            scale_group(from / kGroupSteps, at / kGroupSteps, scales, scale, product, sum, acc);
        }
      }
    };
    if constexpr (kRolled) {
      BK_ROLL
      for (int s = 0; s < kSteps; s += kRolledSteps) BK_UNROLL
      for (int i = 0; i < kRolledSteps; i += 2) two_steps(s, i);
    } else {
      BK_UNROLL
      for (int s = 0; s < kSteps; s += 2) two_steps(0, s);
    }
  }

  BK_METHOD static void scale_group(int before, int group, PerLane<const char*>& scales,
                                    PerLane<Few<uint32_t, 4>>* scale, PerLane<Floats4> (*product)[kColumns],
                                    PerLane<Floats4>* sum, Sums<K>& acc) {
    BK_UNROLL
    for (int u = 0; u < S::kTiles; ++u)
      for_lanes([&](int lane) {
        Few<uint32_t, 4>& w = scale[u][lane];
        if (kGroups == 1 || kRolled) {
          const Pair pair = *(const Pair*)(scales[lane] + u * K::kUnit + (before + group) * 8);
          w.v[0] = pair.w[0], w.v[1] = pair.w[1];
        } else if (group % 2 == 0) {
          const Quad quad = *(const Quad*)(scales[lane] + u * K::kUnit + group * 8);
          BK_UNROLL
          for (int i = 0; i < 4; ++i) w.v[i] = quad.w[i];
        }
        GroupScale g[2];
        BK_UNROLL
        for (int h = 0; h < 2; ++h) g[h] = group_scale<K::kCode, K::kOffset>(w.v[kRolled ? h : group % 2 * 2 + h]);
        BK_UNROLL
        for (int c = 0; c < kColumns; ++c) BK_UNROLL
        for (int r = 0; r < 4; ++r) {
          float value = product[u][c][lane].v[r];
          float& to = acc.at[u][c][lane].v[r];
          const float all = kSum ? sum[c][lane].v[r] : 0.0f;
          if constexpr (O::kA) value += g[r / 2].a * all;
          to += g[r / 2].scale * value;
          if constexpr (O::kB) to += g[r / 2].b * all;
        }
      });
  }

  // A warp's steps of a row tile are done.
  BK_METHOD void end(int warp, int, Sums<K>& acc) {
    if constexpr (kSum && !K::kGroup)
      each_sum<K>(acc, [&](int i, int, int c, Floats4& value) {
        BK_UNROLL
        for (int r = 0; r < 4; ++r) value.v[r] -= kAdded<K::kCode> * all[warp][c][i % kLanes].v[r];
      });
  }

  // Two rows of two tokens: sums `u`, `c` of a lane.
  BK_METHOD static void write(const FewProduct& p, int tile, int u, int c, int lane, const Floats4& value) {
    BK_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int n = tile * S::kTileRows + u * 16 + lane / 4 + 8 * h;
      if (n >= p.n) continue;
      const float factor =
          (p.factor ? p.factor[n] : 1.0f) * (kMend<K::kCode, K::kType> * (kSixteen && h ? 0.0625f : 1.0f));
      float bias = 0.0f;
      if (p.bias)
        bias = p.bias_type == Type::f32 ? ((const float*)p.bias)[n] : widen(((const uint16_t*)p.bias)[n], p.bias_type);
      BK_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int m = c * 8 + lane % 4 * 2 + r;
        if (m < p.m) store<K::kType>(p, (int64_t)m * p.n + n, value.v[2 * h + r] * factor + bias);
      }
    }
  }
};

}  // namespace
}  // namespace cuda
}  // namespace bigkernels
