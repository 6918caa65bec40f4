// A thread block's work on a linear layer of a few tokens. Rows of the weight are the rows of matrix fragments and
// tokens their columns, so that one instruction multiplies 16 x 16 weights with 8 tokens, and the scale of a row
// belongs to one lane's registers. All row tiles' depths are one line of steps that is cut into equal parts, one a
// block; where a row tile was cut, the block that finishes it last adds up all parts, in the order of the line.
#pragma once
#include "few_formats.cuh"

namespace bigkernels {
namespace cuda {
namespace {

// How the warps of a block share its tile: kDown of them down the rows, each with kTiles times 16 rows, and the others
// along the depth, a run each.
template <int kColumns>  // of 8 tokens
struct Shape {
  static constexpr int kWarps = kColumns <= 4 ? 4 : 8;
  static constexpr int kTiles = kColumns <= 2 ? 4 : kColumns <= 4 ? 2 : 1;  // as registers allow
  static constexpr int kDown = kColumns <= 2 ? 1 : kWarps;
  static constexpr int kAlong = kWarps / kDown;
  static constexpr int kTileRows = 16 * kTiles * kDown;
  static constexpr int kDepth = kRun * kAlong;                   // of a step
  static constexpr int kWarpParts = kTiles * kColumns * kLanes;  // of four sums: what a warp adds up
  static constexpr int kParts = kDown * kWarpParts;
};

// The steps of all row tiles in one line, and how blocks share it.
struct Line {
  int runs, tile_steps, tiles, share;

  template <class S>
  static Line of(const FewProduct& p, int blocks) {
    const int runs = (p.k + kRun - 1) / kRun, steps = (p.k + S::kDepth - 1) / S::kDepth;
    const int tiles = (p.n + S::kTileRows - 1) / S::kTileRows;
    const int share = (int)(((int64_t)tiles * steps + blocks - 1) / blocks);
    return {runs, steps, tiles, share < 1 ? 1 : share};
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

// Shared memory: a ring of stages, what warps add up among them, a word, and the table of a codebook.
template <int kColumns>
struct Layout {
  typedef Shape<kColumns> S;
  static int stage(const FewProduct& p) {
    return S::kWarps * S::kTiles * unit_bytes(p.code, p.group) + p.m * S::kDepth * 2;
  }
  static constexpr int kSums = S::kAlong * S::kParts * 16 + 16;
  static int bytes(const FewProduct& p, int stages) {
    return (p.code == FewCode::book4 ? kTableBytes : 0) + kSums + stages * stage(p);
  }
};

template <FewCode kCode, FewOffset kOffset, int kGroup, Type kType, int kColumns>
struct Block {
  typedef Shape<kColumns> S;
  static constexpr int kWarps = S::kWarps;
  static constexpr int kUnit = unit_bytes(kCode, kGroup);
  static constexpr int kQuad = kLanes * 16;             // bytes of a lane's loads of 16, of all lanes
  static constexpr int kPerQuad = 16 / bits_of(kCode);  // matrix steps in one
  static constexpr int kGroupSteps = kGroup ? kGroup / 16 : kSteps;
  static constexpr int kPieces = S::kDepth / 8;  // of 16 bytes of a token in a step
  static constexpr bool kSum = has_offset(kOffset);

  struct Sums {
    PerLane<Floats4> at[S::kTiles][kColumns];
  };

  const FewProduct& p;
  const Line line;
  const int block, stages;
  char *table, *sums, *ring;
  Floats4* parts;
  int* counters;
  PerWarp<Sums, kWarps> acc;
  PerWarp<PerLane<int>, kWarps> piece, token;  // of the first that a thread loads
  PerWarp<PerLane<const char*>, kWarps> from;
  PerWarp<PerLane<int>[kColumns], kWarps> matrix;
  PerWarp<PerLane<Words4>, kWarps> ones;

  BK_METHOD Block(const FewProduct& p, const Line& line, int block, int stages, char* shared, void* workspace,
                  int* counters)
      : p(p),
        line(line),
        block(block),
        stages(stages),
        table(shared),
        sums(shared + (kCode == FewCode::book4 ? kTableBytes : 0)),
        ring(sums + Layout<kColumns>::kSums),
        parts((Floats4*)workspace),
        counters(counters) {}

  BK_METHOD int x_bytes() const { return p.m * S::kDepth * 2; }
  BK_METHOD char* stage_of(int i) const { return ring + i * (kWarps * S::kTiles * kUnit + x_bytes()); }

  // ---- loads --------------------------------------------------------------------------------------------------------

  // What does not change from step to step. Tokens lie a row of 16-byte pieces each, of which eight trade places by the
  // token, so that the rows of a matrix are in different banks.
  BK_METHOD void prepare() {
    each_warp<kWarps>([&](int warp) {
      for_lanes([&](int lane) {
        const int thread = warp * kLanes + lane;
        piece[warp][lane] = thread % kPieces;
        token[warp][lane] = thread / kPieces;
        from[warp][lane] = (const char*)p.x + (thread / kPieces * p.stride + thread % kPieces * 8) * 2;
        BK_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          int t = c * 8 + lane % 8;
          t = t < p.m ? t : p.m - 1;  // columns that nobody reads
          matrix[warp][c][lane] = (t * S::kDepth + warp / S::kDown * kRun) * 2 + ((lane / 8) ^ (t & 7)) * 16;
        }
        BK_UNROLL
        for (int r = 0; r < 4; ++r) ones[warp][lane].v[r] = opaque(both(kType == Type::bf16 ? 0x3f80 : 0x3c00));
      });
    });
  }

  // A step to a stage: a warp its own units, and all of them together the tokens.
  BK_METHOD void load(int warp, int tile, int step, char* stage) {
    const int run = step * S::kAlong + warp / S::kDown, unit = (tile * S::kDown + warp % S::kDown) * S::kTiles;
    const int fours = unit / 4 * line.runs + run;
    const bool inside = run < line.runs && unit < (p.n + 63) / 64 * 4;
    for_lanes([&](int lane) {
      if (inside)
        copy_pieces<S::kTiles * kUnit / 16>(
            stage + x_bytes() + warp * S::kTiles * kUnit + lane * 16,
            (const char*)p.weight + unit % 4 * kUnit + lane * 16 + (int64_t)fours * (4 * kUnit), lane);
      constexpr int kNext = kWarps * kLanes / kPieces;
      const int first = token[warp][lane], place = piece[warp][lane];
      const char* x = from[warp][lane] + (int64_t)step * (S::kDepth * 2);
      const int bytes = step * S::kDepth + place * 8 < p.k ? 16 : 0;
      BK_ROLL
      for (int t = first; t < p.m; t += kNext, x += kNext * 2 * p.stride)
        copy16(stage + (t * kPieces + (place ^ (t & 7))) * 16, bytes ? x : (const char*)p.x, bytes);
    });
  }

  // ---- products -----------------------------------------------------------------------------------------------------

  // A warp's run of a stage.
  BK_METHOD void compute(int warp, const char* stage) {
    const char* units = stage + x_bytes() + warp * S::kTiles * kUnit;
    PerLane<const char*> codes, scales;
    for_lanes([&](int lane) {
      codes[lane] = units + lane * 16;
      scales[lane] = units + code_bytes(kCode) + lane / 4 * 8;
    });
    PerLane<SharedPlace> entries;
    for_lanes([&](int lane) { entries[lane] = place_of(table + lane * 4); });
    PerLane<Quad> words[S::kTiles];
    PerLane<Floats4> product[S::kTiles][kColumns], sum[kColumns];
    BK_UNROLL
    for (int s = 0; s < kSteps; s += 2) {  // two matrix steps at a time
      if (s % kPerQuad == 0) {
        BK_UNROLL
        for (int u = 0; u < S::kTiles; ++u)
          for_lanes([&](int lane) { words[u][lane] = *(const Quad*)(codes[lane] + u * kUnit + s / kPerQuad * kQuad); });
      }
      PerLane<Words4> x[kColumns];
      BK_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        PerLane<const char*> at;
        for_lanes([&](int lane) { at[lane] = stage + (matrix[warp][c][lane] ^ (s / 2 & 1) * 64) + s / 4 * 128; });
        load_matrices(x[c], at);
      }
      BK_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        const int step = s + odd;
        const bool first = kGroup && step % kGroupSteps == 0;
        PerLane<Words2> b[kColumns];
        BK_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          for_lanes([&](int lane) { b[c][lane] = {{x[c][lane].v[2 * odd], x[c][lane].v[2 * odd + 1]}}; });
          if constexpr (kSum) multiply_add<kType>(sum[c], ones[warp], b[c], first);
        }
        BK_UNROLL
        for (int u = 0; u < S::kTiles; ++u) {
          PerLane<Words4> a;
          for_lanes([&](int lane) {
            a[lane] = decode<kCode, kType>(words[u][lane].w + step % kPerQuad * (4 / kPerQuad), entries[lane]);
          });
          BK_UNROLL
          for (int c = 0; c < kColumns; ++c)
            multiply_add<kType>(kGroup ? product[u][c] : acc[warp].at[u][c], a, b[c], first);
        }
        if (kGroup && step % kGroupSteps == kGroupSteps - 1) {
          BK_UNROLL
          for (int u = 0; u < S::kTiles; ++u)
            for_lanes([&](int lane) {
              const Pair pair = *(const Pair*)(scales[lane] + u * kUnit + step / kGroupSteps * 64);
              GroupScale g[2];
              BK_UNROLL
              for (int h = 0; h < 2; ++h) g[h] = group_scale<kOffset, kType>(pair.w[h]);
              BK_UNROLL
              for (int c = 0; c < kColumns; ++c) BK_UNROLL
              for (int r = 0; r < 4; ++r) {
                float value = product[u][c][lane].v[r];
                float& to = acc[warp].at[u][c][lane].v[r];
                if constexpr (kSum) value += g[r / 2].a * sum[c][lane].v[r & 1];
                to += g[r / 2].scale * value;
                if constexpr (kOffset == FewOffset::minimum) to += g[r / 2].b * sum[c][lane].v[r & 1];
              }
            });
        }
      }
    }
  }

  // ---- results ------------------------------------------------------------------------------------------------------

  template <class F>
  BK_METHOD void each_sum(int warp, const F& f) {
    BK_UNROLL
    for (int u = 0; u < S::kTiles; ++u) BK_UNROLL
    for (int c = 0; c < kColumns; ++c)
      for_lanes([&](int lane) { f((u * kColumns + c) * kLanes + lane, acc[warp].at[u][c][lane]); });
  }

  BK_METHOD static void add(Floats4& to, const Floats4& x) {
    BK_UNROLL
    for (int r = 0; r < 4; ++r) to.v[r] += x.v[r];
  }

  // The four sums of part `i` of a row tile: two rows of two tokens.
  BK_METHOD void write(int tile, int i, const Floats4& value) {
    const int lane = i % kLanes, c = i / kLanes % kColumns, u = i / kLanes / kColumns;
    BK_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int n = tile * S::kTileRows + u * 16 + lane / 4 + 8 * h;
      if (n >= p.n) continue;
      const float factor = (p.factor ? p.factor[n] : 1.0f) * kMend<kCode, kType>;
      float bias = 0.0f;
      if (p.bias)
        bias = p.bias_type == Type::f32 ? ((const float*)p.bias)[n] : widen(((const uint16_t*)p.bias)[n], p.bias_type);
      BK_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int m = c * 8 + lane % 4 * 2 + r;
        if (m >= p.m) continue;
        const float y = value.v[2 * h + r] * factor + bias;
        const int64_t to = (int64_t)m * p.n + n;
        if (p.wide)
          ((float*)p.out)[to] = y;
        else
          ((uint16_t*)p.out)[to] = (uint16_t)(kType == Type::bf16 ? nearest_bf16(y) : nearest_f16(y));
      }
    }
  }

  // f of the parts of a row tile, which the warps share.
  template <class F>
  BK_METHOD static void share_parts(int warp, const F& f) {
    for (int from = warp * kLanes; from < S::kParts; from += kWarps * kLanes)
      for_lanes([&](int lane) { f(from + lane); });
  }

  // The block's steps of a row tile are done.
  BK_METHOD void finish(int tile) {
    Floats4* mine = (Floats4*)sums;
    phase<kWarps>([&](int warp) {  // those of the first run, then of the next
      each_sum(warp, [&](int i, Floats4& value) { mine[warp * S::kWarpParts + i] = value; });
    });
    const int first = line.first(tile), last = line.last(tile);
    Floats4* to = global(parts) + (int64_t)line.slot(block, tile) * S::kParts;
    phase<kWarps>([&](int warp) {
      share_parts(warp, [&](int i) {
        Floats4 value = mine[i];
        BK_UNROLL
        for (int a = 1; a < S::kAlong; ++a) add(value, mine[a * S::kParts + i]);
        if (first == last)
          write(tile, i, value);
        else
          to[i] = value;
      });
      if (first != last) publish();
    });
    if (first == last) return;
    int* done = (int*)(sums + Layout<kColumns>::kSums - 16);
    phase<kWarps>([&](int warp) {
      for_lanes([&](int lane) {
        if (warp == 0 && lane == 0) *done = count(&counters[tile]);
      });
    });
    if (*done != last - first) return;
    each_warp<kWarps>([&](int warp) {
      publish();
      share_parts(warp, [&](int i) {
        Floats4 value = read_published(global(parts) + (int64_t)line.slot(first, tile) * S::kParts + i);
        for (int b = first + 1; b <= last; ++b)
          add(value, read_published(global(parts) + (int64_t)line.slot(b, tile) * S::kParts + i));
        write(tile, i, value);
      });
      for_lanes([&](int lane) {
        if (warp == 0 && lane == 0) counters[tile] = 0;
      });
    });
  }

  // ---- the line -----------------------------------------------------------------------------------------------------

  // Until the next stage is there: all but the copies to those after it.
  BK_METHOD void wait() {
    if (stages == 2)
      arrived<0>();
    else
      arrived<1>();
  }

  BK_METHOD void run() {
    const int begin = block * line.share, all = line.total();
    const int end = begin + line.share < all ? begin + line.share : all;
    int tile = begin / line.tile_steps, step = begin - tile * line.tile_steps, stage = 0;
    prepare();
    int next_tile = tile, next_step = step, next = begin;  // to be loaded
    const auto advance = [&] {
      ++next;
      if (++next_step == line.tile_steps) next_step = 0, ++next_tile;
    };
    for (int i = 0; i < stages - 1; ++i, advance())
      each_warp<kWarps>([&](int warp) {
        if (next < end) load(warp, next_tile, next_step, stage_of(i));
        commit();
      });
    phase<kWarps>([&](int warp) {
      if constexpr (kCode == FewCode::book4)
        for_lanes([&](int lane) {
          for (int i = warp; i < 256; i += kWarps)
            *(uint32_t*)(table + i * 128 + lane * 4) = table_entry<kType>(p.book, i);
        });
      wait();
    });
    for (int at = begin; at < end; ++tile, step = 0) {
      each_warp<kWarps>([&](int warp) { each_sum(warp, [](int, Floats4& value) { value = {}; }); });
      do {
        phase<kWarps>([&](int warp) {
          if (next < end) load(warp, next_tile, next_step, stage_of(stage ? stage - 1 : stages - 1));
          commit();
          if (step * S::kAlong + warp / S::kDown < line.runs) compute(warp, stage_of(stage));
          wait();
        });
        advance();
        if (++stage == stages) stage = 0;
      } while (++at < end && ++step < line.tile_steps);
      finish(tile);
    }
  }
};

}  // namespace
}  // namespace cuda
}  // namespace bigkernels
