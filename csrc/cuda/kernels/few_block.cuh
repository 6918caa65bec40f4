// A thread block's work on a linear layer of a few tokens: its part of the line of steps, through a ring of stages.
#pragma once
#include "few_backward.cuh"
#include "few_forward.cuh"

namespace bigkernels {
namespace cuda {
namespace {

template <bool kBackward, class K>
struct WayOf {
  typedef Forward<K> Type;
};
template <class K>
struct WayOf<true, K> {
  typedef Backward<K> Type;
};

template <class K>
struct Block {
  typedef Parts<K> S;
  static constexpr int kWarps = S::kWarps;
  static constexpr int kPieces = S::kDepth / 8;  // of 16 bytes of a token in a step

  const FewProduct& p;
  const Line line;
  const int block, stages;
  char *table, *ring;
  Floats4 *sums, *parts;
  int* counters;
  typename WayOf<K::kBackward, K>::Type way;
  PerWarp<Sums<K>, kWarps> acc;
  PerWarp<PerLane<int>, kWarps> piece, token;  // of the first that a thread loads
  // What a thread loads next; how many steps of the row tile have units for this warp, and elements of tokens are left.
  // Where there are none it is zeros, so that all warps do the same: branches would keep the compiler from registers
  // that all lanes share.
  PerWarp<PerLane<const char*>, kWarps> units_at, tokens_at;
  PerWarp<int, kWarps> units_left;
  PerWarp<PerLane<int>, kWarps> depth_left;

  BK_METHOD Block(const FewProduct& p, const Line& line, int block, int stages, char* shared, void* workspace,
                  int* counters)
      : p(p),
        line(line),
        block(block),
        stages(stages),
        table(shared),
        ring(shared + S::kRing),
        sums((Floats4*)(shared + S::kTable)),
        parts((Floats4*)workspace),
        counters(counters) {}

  // ---- loads --------------------------------------------------------------------------------------------------------

  BK_METHOD void prepare() {
    each_warp<kWarps>([&](int warp) {
      for_lanes([&](int lane) {
        const int thread = warp * kLanes + lane;
        piece[warp][lane] = thread % kPieces;
        token[warp][lane] = thread / kPieces;
      });
      way.prepare(p, warp);
    });
  }

  // The next to be loaded is a step of a row tile.
  BK_METHOD void go_to(int tile, int step) {
    each_warp<kWarps>([&](int warp) {
      units_left[warp] = way.steps(p, line, warp, tile) - step;
      for_lanes([&](int lane) {
        units_at[warp][lane] = (const char*)p.weight + way.place(line, warp, tile) + step * way.next(line) + lane * 16;
        const int64_t depth = (int64_t)step * S::kDepth + piece[warp][lane] * 8;
        depth_left[warp][lane] = (int)((K::kBackward ? p.n : p.k) - depth);
        tokens_at[warp][lane] = (const char*)p.x + (token[warp][lane] * p.stride + depth) * 2;
      });
    });
  }

  // A step to a stage: a warp its own units, and all of them together the tokens. Those lie a row of 16-byte pieces
  // each, of which eight trade places by the token, so that the rows of a matrix are in different banks.
  BK_METHOD void load(int warp, char* stage) {
    for_lanes([&](int lane) {
      copy_pieces<S::kCopied * K::kUnit / 16>(stage + S::tokens(p) + warp * S::kCopied * K::kUnit + lane * 16,
                                              units_at[warp][lane], units_left[warp] > 0 ? 16 : 0, lane);
      units_at[warp][lane] += way.next(line);
      constexpr int kNext = kWarps * kLanes / kPieces;
      const char* x = tokens_at[warp][lane];
      const int bytes = depth_left[warp][lane] > 0 ? 16 : 0, place = piece[warp][lane];
      BK_ROLL
      for (int t = token[warp][lane]; t < p.m; t += kNext, x += kNext * 2 * p.stride)
        copy16(stage + (t * kPieces + (place ^ (t & 7))) * 16, x, bytes);
      depth_left[warp][lane] -= S::kDepth;
      tokens_at[warp][lane] += S::kDepth * 2;
    });
    --units_left[warp];
  }

  // ---- results ------------------------------------------------------------------------------------------------------

  BK_METHOD void write(int tile, int i, const Floats4& value) const {
    way.write(p, tile, i / kLanes / K::kColumns, i / kLanes % K::kColumns, i % kLanes, value);
  }

  // f of the sums of a row tile, which the warps share.
  template <class F>
  BK_METHOD static void share_sums(int warp, const F& f) {
    for (int from = warp * kLanes; from < S::kSums; from += kWarps * kLanes)
      for_lanes([&](int lane) { f(from + lane); });
  }

  // The block's steps of a row tile are done.
  BK_METHOD void finish(int tile) {
    phase<kWarps>([&](int warp) {  // those of the first part of the depth, then of the next
      way.end(warp, tile, acc[warp]);
      each_sum<K>(acc[warp], [&](int i, int, int, Floats4& value) { sums[warp * S::kWarpSums + i] = value; });
    });
    const int first = line.first(tile), last = line.last(tile);
    Floats4* to = global(parts) + (int64_t)line.slot(block, tile) * S::kSums;
    phase<kWarps>([&](int warp) {
      share_sums(warp, [&](int i) {
        Floats4 value = sums[i];
        BK_UNROLL
        for (int a = 1; a < S::kAlong; ++a) add(value, sums[a * S::kSums + i]);
        if (first == last)
          write(tile, i, value);
        else
          to[i] = value;
      });
      if (first != last) publish();
    });
    if (first == last) return;
    int* done = (int*)(ring - 16);
    phase<kWarps>([&](int warp) {
      for_lanes([&](int lane) {
        if (warp == 0 && lane == 0) *done = count(&counters[tile]);
      });
    });
    if (*done != last - first) return;
    each_warp<kWarps>([&](int warp) {
      publish();
      share_sums(warp, [&](int i) {
        Floats4 value = read_published(global(parts) + (int64_t)line.slot(first, tile) * S::kSums + i);
        for (int b = first + 1; b <= last; ++b)
          add(value, read_published(global(parts) + (int64_t)line.slot(b, tile) * S::kSums + i));
        write(tile, i, value);
      });
      for_lanes([&](int lane) {
        if (warp == 0 && lane == 0) counters[tile] = 0;
      });
    });
  }

  // ---- the line -----------------------------------------------------------------------------------------------------

  // Until the next stage is there: all but the copies to those after it. Where there are none after it, an empty group
  // stands for them.
  BK_METHOD void close() {
    commit();
    if (stages == 2) commit();
  }

  BK_METHOD void run() {
    const int begin = block * line.share, all = line.total();
    const int end = begin + line.share < all ? begin + line.share : all;
    int tile = begin / line.tile_steps, step = begin - tile * line.tile_steps;
    prepare();
    int next_tile = tile, next_step = step, next = begin;  // to be loaded
    go_to(tile, step);
    const auto advance = [&](int by) {
      next += by, next_step += by;
      if (next_step == line.tile_steps) go_to(++next_tile, next_step = 0);
    };
    const int bytes = S::stage(p), ring_bytes = stages * bytes;
    for (int i = 0; i < stages - 1; ++i) {
      const bool loads = next < end;
      each_warp<kWarps>([&](int warp) {
        if (loads) load(warp, ring + i * bytes);
        close();
      });
      if (loads) advance(1);
    }
    phase<kWarps>([&](int warp) {
      if constexpr (K::kCode == FewCode::book4)
        for_lanes([&](int lane) {
          for (int i = warp; i < 256; i += kWarps)
            *(uint32_t*)(table + i * 128 + lane * 4) = table_entry<K::kType>(p.book, i);
        });
      arrived<1>();
    });
    int stage = 0, free = ring_bytes - bytes;  // which is computed, and which is loaded to
    for (int at = begin; at < end; ++tile, step = 0) {
      each_warp<kWarps>([&](int warp) {
        way.begin(warp);
        each_sum<K>(acc[warp], [](int, int, int, Floats4& value) { value = {}; });
      });
      do {
        // Until the row tile ends, or the one that is loaded, or what there is to load.
        const bool loads = next < end;
        int count = line.tile_steps - step < end - at ? line.tile_steps - step : end - at;
        if (loads && line.tile_steps - next_step < count) count = line.tile_steps - next_step;
        if (loads && end - next < count) count = end - next;
        for (const int last = step + count; step < last; ++step) {
          phase<kWarps>([&](int warp) {
            if (loads) load(warp, ring + free);
            close();
            way.compute(warp, ring + stage, ring + stage + S::tokens(p), table, acc[warp]);
            arrived<1>();
          });
          free = stage;
          if ((stage += bytes) == ring_bytes) stage = 0;
        }
        at += count;
        if (loads) advance(count);
      } while (at < end && step < line.tile_steps);
      finish(tile);
    }
  }
};

}  // namespace
}  // namespace cuda
}  // namespace bigkernels
