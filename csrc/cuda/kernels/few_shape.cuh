// What a thread block of a linear layer of a few tokens is made of, and how blocks share the work. All row tiles'
// depths are one line of steps that is cut into equal parts, one a block; where a row tile was cut, the block that
// finishes it last adds up all parts, in the order of the line.
#pragma once
#include "few_formats.cuh"

namespace bigkernels {
namespace cuda {
namespace {

template <FewCode kCode_, FewOffset kOffset_, int kGroup_, Type kType_, int kColumns_, bool kBackward_>
struct Kind {
  static constexpr FewCode kCode = kCode_;
  static constexpr FewOffset kOffset = kOffset_;
  static constexpr int kGroup = kGroup_, kColumns = kColumns_;  // of 8 tokens
  static constexpr Type kType = kType_;
  static constexpr bool kBackward = kBackward_;
  static constexpr int kUnit = unit_bytes(kCode, kGroup);
  static constexpr int kPerQuad = 16 / bits_of(kCode);  // matrix steps in the 16 bytes that a lane loads at once
};

// How the warps of a block share its tile: kDown of them down the rows of results, each with kTiles times 16, and the
// others along the depth, a run (backward: the 64 rows of a four) each; and what each of them copies.
template <int kColumns, bool kBackward>
struct Shape {
  static constexpr int kWarps = kColumns <= 4 ? 4 : 8;
  static constexpr int kTiles = kColumns <= 2 ? 4 : kColumns <= 4 ? 2 : 1;  // as registers allow
  static constexpr int kDown = kColumns <= 2 ? 1 : kWarps;
  static constexpr int kWarpDepth = kRun, kCopied = kTiles;
};
template <int kColumns>
struct Shape<kColumns, true> {
  static constexpr int kWarps = 4;
  static constexpr int kTiles = kColumns <= 2 ? 8 : 2;
  static constexpr int kDown = kSteps / kTiles;
  static constexpr int kWarpDepth = kFour, kCopied = 4 / kDown;
};

template <class K>
struct Parts : Shape<K::kColumns, K::kBackward> {
  typedef Shape<K::kColumns, K::kBackward> S;
  static constexpr int kAlong = S::kWarps / S::kDown;
  static constexpr int kTileRows = 16 * S::kTiles * S::kDown;
  static constexpr int kDepth = S::kWarpDepth * kAlong;               // of a step
  static constexpr int kWarpSums = S::kTiles * K::kColumns * kLanes;  // of four: what a warp adds up
  static constexpr int kSums = S::kDown * kWarpSums;
  static constexpr int kUnits = S::kWarps * S::kCopied * K::kUnit;  // bytes of a step
  // Where a warp has many columns for each of its tiles, it is codes that are lifted.
  static constexpr bool kLiftCodes = kLift<K::kCode, K::kType> && K::kColumns == 8 && !K::kBackward;

  // Shared memory: the table of a codebook, what warps add up among them, a word, and a ring of stages.
  static constexpr int kTable = K::kCode == FewCode::book4 ? kTableBytes : 0;
  static constexpr int kRing = kTable + kAlong * kSums * 16 + 16;
  BK_ANYWHERE static int tokens(const FewProduct& p) { return p.m * kDepth * 2; }
  BK_ANYWHERE static int stage(const FewProduct& p) { return kUnits + tokens(p); }
  static int bytes(const FewProduct& p, int stages) {
    const int read = K::kColumns * 8 * kDepth * 2 - stage(p);  // of the last stage, past it
    return kRing + stages * stage(p) + (read > 0 ? read : 0);
  }
};

// The steps of all row tiles in one line, and how blocks share it.
struct Line {
  int runs, tile_steps, tiles, share;

  template <class K>
  static Line of(const FewProduct& p, int blocks) {
    typedef Parts<K> S;
    const int depth = K::kBackward ? p.n : p.k, rows = K::kBackward ? p.k : p.n;
    const int steps = (depth + S::kDepth - 1) / S::kDepth, tiles = (rows + S::kTileRows - 1) / S::kTileRows;
    const int share = (int)(((int64_t)tiles * steps + blocks - 1) / blocks);
    return {(p.k + kRun - 1) / kRun, steps, tiles, share < 1 ? 1 : share};
  }
  BK_ANYWHERE int total() const { return tiles * tile_steps; }
  BK_ANYWHERE int blocks() const { return (total() + share - 1) / share; }
  // The first and last of the blocks that a row tile was shared among.
  BK_METHOD int first(int tile) const { return tile * tile_steps / share; }
  BK_METHOD int last(int tile) const { return ((tile + 1) * tile_steps - 1) / share; }
  // Where a block puts its part of a row tile: at most two are not all its own, that in which it begins and that in
  // which it ends.
  BK_METHOD int slot(int block, int tile) const { return 2 * block + (block * share < tile * tile_steps); }
};

// What a warp adds up in registers.
template <class K>
struct Sums {
  PerLane<Floats4> at[Parts<K>::kTiles][K::kColumns];
};

template <class K, class F>
BK_METHOD void each_sum(Sums<K>& sums, const F& f) {
  BK_UNROLL
  for (int u = 0; u < Parts<K>::kTiles; ++u) BK_UNROLL
  for (int c = 0; c < K::kColumns; ++c)
    for_lanes([&](int lane) { f((u * K::kColumns + c) * kLanes + lane, u, c, sums.at[u][c][lane]); });
}

// A step's tokens lie a row of 16-byte pieces each, of which eight trade places by the token, so that the rows of a
// matrix are in different banks. This is the place of a warp's first matrices of the first eight tokens; the next two
// along the depth lie 64 bytes away (exclusive or), the others 128 bytes on. Past the tokens there are columns of
// anything, which nobody reads.
template <class K>
BK_DEVICE int matrix_place(int warp, int lane) {
  typedef Parts<K> S;
  const int t = lane % 8;
  return (t * S::kDepth + warp / S::kDown * S::kWarpDepth) * 2 + ((lane / 8) ^ t) * 16;
}
// The matrices of two steps, of the pair `pair` along the depth.
template <class K>
BK_DEVICE void load_tokens(PerLane<Words4>* x, const char* tokens, PerLane<int>& place, int pair) {
  BK_UNROLL
  for (int c = 0; c < K::kColumns; ++c) {
    PerLane<const char*> at;
    for_lanes([&](int lane) {
      at[lane] = tokens + (place[lane] ^ pair % 2 * 64) + pair / 2 * 128 + c * (8 * 2 * Parts<K>::kDepth);
    });
    load_matrices(x[c], at);
  }
}

template <class K, int kCount>
BK_DEVICE Few<uint32_t, kCount> lifted(Few<uint32_t, kCount> x) {
  BK_UNROLL
  for (int i = 0; i < kCount; ++i) x.v[i] = fma2<K::kType>(x.v[i], kLift<K::kCode, K::kType>, both(0x8000));
  return x;
}

// Tokens of a step of 16, of two that were loaded.
template <class K>
BK_DEVICE Words2 half_of(const Words4& x, int odd) {
  const Words2 b = {{x.v[2 * odd], x.v[2 * odd + 1]}};
  return kLift<K::kCode, K::kType> && !Parts<K>::kLiftCodes ? lifted<K>(b) : b;
}

template <Type kType>
BK_DEVICE void store(const FewProduct& p, int64_t to, float y) {
  if (p.wide)
    ((float*)p.out)[to] = y;
  else
    ((uint16_t*)p.out)[to] = (uint16_t)(kType == Type::bf16 ? nearest_bf16(y) : nearest_f16(y));
}

BK_DEVICE void add(Floats4& to, const Floats4& x) {
  BK_UNROLL
  for (int r = 0; r < 4; ++r) to.v[r] += x.v[r];
}

}  // namespace
}  // namespace cuda
}  // namespace bigkernels
