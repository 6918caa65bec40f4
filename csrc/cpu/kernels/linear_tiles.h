// Linear layers, a few tokens, on tile units: rows of the weight stand on the left as they are stored, or decoded a
// chunk at a time, and sums stay in the tile registers for the whole depth. What is left is to read the weight once.
#pragma once
#include "gemm.h"
#include "linear_codes.h"

#if defined(__AMX_BF16__)
namespace bigkernels {
namespace BK_ISA {
namespace {
namespace tiles {

constexpr int64_t kChunk = 128;  // elements of a row that are decoded at once: 64 bytes of 4-bit codes
constexpr int64_t kBlocks = kChunk / kSide;
constexpr int64_t kTile = 16 * kSide;  // elements
constexpr int64_t kMost = 64;          // tokens

constexpr int64_t chunks(int64_t k) { return (k + kChunk - 1) / kChunk; }
BK_INLINE int64_t token_groups(const Linear& a) { return (a.m + 15) / 16; }

// Numbers of bfloat16, and codes whose scales are float32, of a row or of a group, or affine ones of 4 bits.
constexpr bool has_decoder(Codes kind) {
  const CodesRow& row = traits(kind);
  return kind == Codes::bf16 || row.scale_bytes == 4 || row.row_scale;
}
BK_INLINE bool supports(const Linear& a) {
  return a.type == Type::bf16 && has_decoder(a.kind) && a.m > 1 && a.m <= kMost;
}
BK_INLINE int64_t ready_bytes(const Linear& a) {
  return token_groups(a) * chunks(a.k) * kBlocks * kTile * (int64_t)sizeof(uint16_t);
}

// Element 4 w + j of a chunk at j * 32 + w: the order in which the nibbles of 32 words give 4-bit codes.
BK_INLINE void to_nibble_order(const __m512i* quarter, uint16_t* to) {
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 4; ++i)
      write(to + j * 32 + i * 8, _mm512_cvtepi64_epi16(_mm512_srli_epi64(quarter[i], 16 * j)));
}

BK_INLINE __mmask32 first_of(int64_t n) { return n >= 32 ? ~__mmask32{0} : n > 0 ? ((__mmask32)1 << n) - 1 : 0; }

// Tokens as right operands: for each 16 of them and each block of 32 elements a tile.
void prepare(const Linear& a, uint16_t* to) {
  alignas(64) uint16_t rows[16][kChunk];
  for (int64_t m = 0; m < a.m; m += 16)
    for (int64_t k = 0; k < a.k; k += kChunk, to += kBlocks * kTile) {
      for (int64_t r = 0; r < 16; ++r) {
        __m512i quarter[4] = {};
        for (int i = 0; i < 4 && m + r < a.m; ++i) {
          const uint16_t* x = (const uint16_t*)a.in.data + (m + r) * a.in.stride + k + i * 32;
          quarter[i] = _mm512_maskz_loadu_epi16(first_of(a.k - k - i * 32), x);
        }
        if (packed(a))
          to_nibble_order(quarter, rows[r]);
        else
          __builtin_memcpy(rows[r], quarter, sizeof quarter);
      }
      for (int b = 0; b < kBlocks; ++b) transpose16(rows[0] + b * kSide, kChunk * 2, to + b * kTile, 64);
    }
}

// ---- rows of codes to rows of bfloat16, a chunk at a time. 8-bit codes stay without their scale, which is the row's.
// ---

BK_INLINE __m512i load_codes(const uint8_t* p, int64_t bytes) {
  return bytes >= 64 ? read<__m512i>(p) : _mm512_maskz_loadu_epi8(((__mmask64)1 << bytes) - 1, p);
}
BK_INLINE void put32(uint16_t* to, __m512 low, __m512 high) { write(to, (__m512i)_mm512_cvtne2ps_pbh(high, low)); }

struct Plain {
  static constexpr bool kRowScale = false;
  static constexpr float kUnit = 1.0f;
  explicit Plain(const Linear&) {}
  BK_INLINE void reach(Plain&, const Linear&, int64_t, int64_t, int64_t) {}
  BK_INLINE void decode(const uint8_t* row, int64_t k, int64_t count, const Plain&, int64_t, uint16_t* to) {
    for (int i = 0; i < kBlocks; ++i, count -= kSide)
      write(to + i * kSide, _mm512_maskz_loadu_epi16(first_of(count), row + 2 * (k + i * kSide)));
  }
};

// Codes of 8 bits: widen(32 codes, to).
template <class Codes>
struct Bytes {
  static constexpr bool kRowScale = true;
  static constexpr float kUnit = Codes::kUnit;
  explicit Bytes(const Linear&) {}
  BK_INLINE void reach(Bytes&, const Linear&, int64_t, int64_t, int64_t) {}
  BK_INLINE void decode(const uint8_t* row, int64_t k, int64_t count, const Bytes&, int64_t, uint16_t* to) {
    for (int i = 0; i < kChunk; i += 32) {
      const uint8_t* from = row + k + i;  // a mask only where the row ends
      Codes::widen(count >= kChunk ? read<__m256i>(from) : _mm256_maskz_loadu_epi8(first_of(count - i), from), to + i);
    }
  }
};

struct Int8 {
  static constexpr float kUnit = 1.0f;
  BK_INLINE void widen(__m256i codes, uint16_t* to) {
    put32(to, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes))),
          _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1))));
  }
};

struct Fp8 {
  static constexpr float kUnit = 256.0f;  // of float8's exponent in float16's place
  BK_INLINE void widen(__m256i codes, uint16_t* to) {
    const __m512i magnitude = _mm512_set1_epi16(0x3f80);
    __m512i half =
        _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7), _mm512_set1_epi16((short)0xbf80));
    __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(half, magnitude), magnitude);
    half = _mm512_mask_mov_epi16(half, nan, _mm512_set1_epi16(0x7e00));
    put32(to, _mm512_cvtph_ps(_mm512_castsi512_si256(half)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)));
  }
};

// 16 values for each group of a row: what its codes stand for. kGroups groups meet in a chunk; their values lie in one
// or two registers, from which a word picks by its nibble and by the group it falls into.
template <bool kAffine, int kGroups, int kRows>
struct Nibbles {
  static constexpr bool kRowScale = false;
  static constexpr float kUnit = 1.0f;
  const float* book;
  // Of 16 groups of each row: the scale, and the scale by the zero point.
  alignas(64) float scale[kRows][16], shift[kRows][16];
  int64_t first = 0;

  explicit Nibbles(const Linear& a) : book(a.book) {}
  // Called for every chunk in turn.
  BK_INLINE void reach(Nibbles& s, const Linear& a, int64_t n, int64_t rows, int64_t k) {
    int64_t group = k / a.group;
    s.first = group & 15;
    if (s.first) return;
    __mmask16 some = (__mmask16)first_of(a.groups - group < 16 ? a.groups - group : 16);
    for (int64_t r = 0; r < rows; ++r) {
      int64_t at = (n + r) * a.groups + group;
      if (kAffine) {
        __m512 scale = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, (const uint16_t*)a.scale + at)),
                                     _mm512_set1_ps(a.row_scale[n + r]));
        write(s.scale[r], scale);
        write(s.shift[r], _mm512_mul_ps(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, a.zero + at)), scale));
      } else {
        write(s.scale[r], _mm512_maskz_loadu_ps(some, (const float*)a.scale + at));
      }
    }
  }
  BK_INLINE __m512 values(const Nibbles& s, int64_t r, int g) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 by = _mm512_set1_ps(s.scale[r][s.first + g]);
    return kAffine ? _mm512_fmsub_ps(codes, by, _mm512_set1_ps(s.shift[r][s.first + g]))
                   : _mm512_mul_ps(_mm512_loadu_ps(s.book), by);
  }
  BK_INLINE void decode(const uint8_t* row, int64_t k, int64_t count, const Nibbles& s, int64_t r, uint16_t* to) {
    __m512i codes = load_codes(row + k / 2, (count + 1) / 2);
    __m512i low = (__m512i)_mm512_cvtne2ps_pbh(values(s, r, kGroups > 1 ? 1 : 0), values(s, r, 0)), high = low;
    if (kGroups == 4) high = (__m512i)_mm512_cvtne2ps_pbh(values(s, r, kGroups - 1), values(s, r, kGroups - 2));
    // Bits 4 and 5 of a lane's index: its group.
    alignas(64) static constexpr auto groups = [] {
      struct {
        uint16_t of[32];
      } x{};
      for (int i = 0; i < 32; ++i) x.of[i] = i * kGroups / 32 * 16;
      return x;
    }();
    const __m512i mine = read<__m512i>(groups.of), nibble = _mm512_set1_epi16(15);
    for (int j = 0; j < 4; ++j) {
      __m512i index = j ? _mm512_srli_epi16(codes, 4 * j) : codes;
      // With one group both halves of the register hold its values, and bit 4 may be anything.
      if (kGroups > 1) index = _mm512_ternarylogic_epi64(index, nibble, mine, 0xea);
      write(to + j * 32,
            kGroups == 4 ? _mm512_permutex2var_epi16(low, index, high) : _mm512_permutexvar_epi16(index, low));
    }
  }
};

// ---- products -------------------------------------------------------------------------------------------------------

// Rows [n, n + 16 R) of the weight with T groups of 16 tokens: R * T accumulators, tiles 0 to 3.
template <int R, int T>
struct Product {
  BK_INLINE void start() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // A quarter of a block of 32 elements: rows from `left`, kChunk elements apart, and tokens from `right`.
  template <int kQuarter>
  BK_INLINE void add(const uint16_t* left, const uint16_t* right, int64_t right_pitch) {
    constexpr int64_t line = kChunk * 2;
    const uint16_t* rows = left + kQuarter * 16 * kChunk;
    if constexpr (R == 4) {
      if (kQuarter == 0) {
        _tile_loadd(7, right, 64);
        _tile_loadd(4, rows, line);
        _tile_dpbf16ps(0, 4, 7);
      } else if (kQuarter == 1) {
        _tile_loadd(5, rows, line);
        _tile_dpbf16ps(1, 5, 7);
      } else if (kQuarter == 2) {
        _tile_loadd(6, rows, line);
        _tile_dpbf16ps(2, 6, 7);
      } else {
        _tile_loadd(4, rows, line);
        _tile_dpbf16ps(3, 4, 7);
      }
    } else if constexpr (R == 2) {
      if (kQuarter == 0) {
        _tile_loadd(4, left, line);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
      } else if (kQuarter == 1) {
        _tile_loadd(5, rows, line);
        _tile_dpbf16ps(2, 5, 6);
      } else if (kQuarter == 2) {
        _tile_loadd(7, right + right_pitch, 64);
        _tile_dpbf16ps(1, 4, 7);
      } else {
        _tile_dpbf16ps(3, 5, 7);
      }
    } else if (kQuarter == 0) {
      _tile_loadd(4, left, line);
      _tile_loadd(5, right, 64);
      _tile_dpbf16ps(0, 4, 5);
    } else if (kQuarter == 1) {
      _tile_loadd(6, right + right_pitch, 64);
      _tile_dpbf16ps(1, 4, 6);
    } else if (kQuarter == 2) {
      _tile_loadd(7, right + 2 * right_pitch, 64);
      _tile_dpbf16ps(2, 4, 7);
    } else if (T > 3) {
      _tile_loadd(5, right + 3 * right_pitch, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  BK_INLINE void put(const Linear& a, int64_t n, int64_t end, bool row_scale, float unit) {
    alignas(64) float sums[4][16][16], transposed[16][16];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    asm volatile("" ::: "memory");
    for (int r = 0; r < R; ++r) {
      int64_t row = n + 16 * r, count = end - row < 16 ? end - row : 16;
      if (count <= 0) return;
      vf scale = row_scale ? load((const float*)a.scale + row, count) * unit : splat(1.0f);
      vf bias = a.bias ? load(a.bias + row, count) : vf{};
      for (int t = 0; t < T; ++t) {
        transpose16(sums[r * T + t], 64, transposed, 64);
        for (int64_t m = t * 16; m < a.m && m < t * 16 + 16; ++m) {
          vf y = load(transposed[m % 16]) * scale + bias;
          int64_t at = m * a.n + row;
          if (a.out_type == Type::f32) {
            store((float*)a.out + at, y, count);
          } else {
            count == 16 ? store((bf16*)a.out + at, y) : store((bf16*)a.out + at, y, count);
          }
        }
      }
    }
  }
};

// A chunk is decoded while the one before is multiplied: the tile unit works beside the vector units where its
// instructions stand among theirs.
template <class Decoder, int R, int T>
void coded(const Linear& a, const uint16_t* ready, int64_t begin, int64_t end) {
  alignas(64) uint16_t staged[2][16 * R][kChunk];
  int64_t all = chunks(a.k), pitch = all * kBlocks * kTile;
  Decoder with(a);
  for (int64_t n = begin; n < end; n += 16 * R) {
    int64_t rows = end - n < 16 * R ? end - n : 16 * R;
    const uint8_t* first = a.codes + n * a.code_row;
    auto decode = [&](int64_t p, int64_t r) __attribute__((always_inline)) {
      int64_t k = p * kChunk, count = a.k - k < kChunk ? a.k - k : kChunk;
      const uint8_t* row = first + (r < rows ? r : rows - 1) * a.code_row;
      for (int64_t i = 0; i < code_bytes(a.kind, kChunk); i += 64)
        prefetch(row + code_bytes(a.kind, k + 4 * kChunk) + i);
      Decoder::decode(row, k, count, with, r, staged[p & 1][r]);
    };
    Decoder::reach(with, a, n, rows, 0);
    for (int64_t r = 0; r < 16 * R; ++r) decode(0, r);
    Product<R, T>::start();
    for (int64_t p = 0; p < all; ++p) {
      asm volatile("" ::: "memory");
      const uint16_t *left = staged[p & 1][0], *right = ready + p * kBlocks * kTile;
      if (p + 1 == all) {
        for (int64_t b = 0; b < kBlocks; ++b, left += kSide, right += kTile) {
          Product<R, T>::template add<0>(left, right, pitch);
          Product<R, T>::template add<1>(left, right, pitch);
          Product<R, T>::template add<2>(left, right, pitch);
          Product<R, T>::template add<3>(left, right, pitch);
        }
        break;
      }
      Decoder::reach(with, a, n, rows, (p + 1) * kChunk);
      auto some = [&](int64_t r) __attribute__((always_inline)) {
        for (int i = 0; i < R; ++i) decode(p + 1, r + i);
      };
      for (int64_t b = 0; b < kBlocks; ++b, left += kSide, right += kTile) {
        Product<R, T>::template add<0>(left, right, pitch);
        some(4 * b * R);
        Product<R, T>::template add<1>(left, right, pitch);
        some((4 * b + 1) * R);
        Product<R, T>::template add<2>(left, right, pitch);
        some((4 * b + 2) * R);
        Product<R, T>::template add<3>(left, right, pitch);
        some((4 * b + 3) * R);
      }
    }
    Product<R, T>::put(a, n, end, Decoder::kRowScale, Decoder::kUnit);
  }
}

template <int R, int T>
void rows_of(const Linear& a, const uint16_t* ready, int64_t begin, int64_t end) {
  switch (a.kind) {
    case Codes::bf16: return coded<Plain, R, T>(a, ready, begin, end);
    case Codes::int8: return coded<Bytes<Int8>, R, T>(a, ready, begin, end);
    case Codes::fp8: return coded<Bytes<Fp8>, R, T>(a, ready, begin, end);
    case Codes::affine4:
      return a.group == 32   ? coded<Nibbles<true, 4, 16 * R>, R, T>(a, ready, begin, end)
             : a.group == 64 ? coded<Nibbles<true, 2, 16 * R>, R, T>(a, ready, begin, end)
                             : coded<Nibbles<true, 1, 16 * R>, R, T>(a, ready, begin, end);
    case Codes::book4:
      return a.group == 32   ? coded<Nibbles<false, 4, 16 * R>, R, T>(a, ready, begin, end)
             : a.group == 64 ? coded<Nibbles<false, 2, 16 * R>, R, T>(a, ready, begin, end)
                             : coded<Nibbles<false, 1, 16 * R>, R, T>(a, ready, begin, end);
    default: return;
  }
}

void run(const Linear& a, const uint16_t* ready, int64_t begin, int64_t end) {
  BK_ISA::Pairs<1>::begin();
  switch (token_groups(a)) {
    case 1: rows_of<4, 1>(a, ready, begin, end); break;
    case 2: rows_of<2, 2>(a, ready, begin, end); break;
    case 3: rows_of<1, 3>(a, ready, begin, end); break;
    default: rows_of<1, 4>(a, ready, begin, end); break;
  }
  BK_ISA::Pairs<1>::end();
}

}  // namespace tiles
}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
#endif
