// Products of 8-bit and 4-bit codes by sdot beside those of the base level: bit for bit, and W8A8 near float64 as well.
#include <bigkernels/program.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace bigkernels {

#define BK_LEVEL(level)                                                                                  \
  namespace level {                                                                                      \
  int64_t panel_bytes(const Weight&, int32_t);                                                           \
  void make_panels(const Weight&, int64_t, int64_t);                                                     \
  int64_t product_ready(const Weight&, int32_t, int64_t);                                                \
  int64_t product_workspace(const Weight&, int32_t, int64_t, int64_t);                                   \
  void product_prepare(const Weight&, int32_t, const float*, int64_t, int64_t, int64_t, int64_t, void*); \
  void product(const Weight&, int32_t, const void*, int64_t, int64_t, int64_t, float*, int64_t, void*);  \
  int64_t linear_dynamic_row_block_bytes(const Linear&);                                                 \
  int64_t linear_dynamic_token(const Linear&);                                                           \
  int64_t linear_dynamic_workspace(const Linear&, int64_t);                                              \
  void linear_dynamic_pack(const Linear&, int64_t, int64_t, void*, float*, void*);                       \
  void linear_dynamic(const Linear&, const void*, const float*, int64_t, int64_t, void*);                \
  struct Level {                                                                                         \
    static constexpr auto bytes = panel_bytes;                                                           \
    static constexpr auto panels = make_panels;                                                          \
    static constexpr auto ready = product_ready;                                                         \
    static constexpr auto workspace = product_workspace;                                                 \
    static constexpr auto prepare = product_prepare;                                                     \
    static constexpr auto multiply = product;                                                            \
    static constexpr auto dynamic_row_block_bytes = linear_dynamic_row_block_bytes;                      \
    static constexpr auto dynamic_token = linear_dynamic_token;                                          \
    static constexpr auto dynamic_workspace = linear_dynamic_workspace;                                  \
    static constexpr auto dynamic_pack = linear_dynamic_pack;                                            \
    static constexpr auto dynamic_multiply = linear_dynamic;                                             \
  };                                                                                                     \
  }
BK_LEVEL(base)
BK_LEVEL(dotprod)

}  // namespace bigkernels

using namespace bigkernels;

namespace {

uint32_t state = 1;
uint32_t random_bits() { return (state = state * 1664525u + 1013904223u) >> 8; }
float random_float() { return (float)(random_bits() % 2001) / 1000 - 1; }

struct Memory {
  void* data;
  explicit Memory(int64_t bytes) : data(std::aligned_alloc(64, (bytes + 191) / 64 * 64)) {}
  Memory(const Memory&) = delete;
  ~Memory() { std::free(data); }
};

template <class L>
std::vector<float> product(Weight w, const std::vector<float>& x, int64_t m, bool with_panels) {
  const int64_t strips = (w.n + 15) / 16, bytes = with_panels ? L::bytes(w, 1) : 0;
  Memory panels(bytes * strips);
  if (bytes) {
    w.panels = (uint8_t*)panels.data, w.panel_step = bytes;
    L::panels(w, 0, strips);
  }
  Memory ready(L::ready(w, 1, m)), workspace(L::workspace(w, 1, m, w.n));
  std::vector<float> out(m * w.n, NAN);
  L::prepare(w, 1, x.data(), w.k, m, 0, m, ready.data);
  L::multiply(w, 1, ready.data, m, 0, w.n, out.data(), w.n, workspace.data);
  return out;
}

template <class L>
std::vector<float> dynamic(Linear a) {
  const int64_t strips = (a.m + 31) / 32;
  Memory left(strips * L::dynamic_row_block_bytes(a)), token(L::dynamic_token(a)),
      workspace(L::dynamic_workspace(a, a.n));
  std::vector<float> out(a.m * a.n, NAN), scales(strips * 32);
  a.out = out.data();
  L::dynamic_pack(a, 0, strips, left.data, scales.data(), token.data);
  L::dynamic_multiply(a, left.data, scales.data(), 0, a.n, workspace.data);
  return out;
}

int wrong = 0, cases = 0;

void check(bool right, const char* name, int64_t n, int64_t k, int64_t m) {
  ++cases;
  if (!right && ++wrong <= 10) std::printf("%s: %ld x %ld, %ld tokens\n", name, (long)n, (long)k, (long)m);
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  for (float v : a)
    if (!std::isfinite(v)) return false;
  return !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

void check_product(Codes kind, int64_t group, const char* name, int64_t n, int64_t k, int64_t m) {
  const int64_t row = code_bytes(kind, k), groups = group ? k / group : 1;
  std::vector<uint8_t> codes(n * row + 64);
  for (auto& c : codes) do
      c = (uint8_t)random_bits();
    while (c == 0x80);
  std::vector<uint16_t> scale(n * groups + 32), zero(scale.size());  // float16
  for (auto& v : scale) v = (uint16_t)(0x2000 + random_bits() % 0x800);
  for (auto& v : zero) v = (uint16_t)(0x3c00 + random_bits() % 0x1000);
  std::vector<float> of_rows(n + 16), x(m * k);
  for (auto& v : of_rows) v = 1.1f + random_float();
  for (auto& v : x) v = random_float();
  Weight w{};
  w.n = n, w.k = k, w.kind = kind, w.codes = codes.data(), w.code_row = row, w.group = group;
  w.groups = group ? groups : 0, w.zero = zero.data(), w.row_scale = of_rows.data();
  w.scale = group ? (const void*)scale.data() : of_rows.data();
  for (bool panels : {false, true})
    check(same(product<base::Level>(w, x, m, panels), product<dotprod::Level>(w, x, m, panels)), name, n, k, m);
}

void check_dynamic(int64_t n, int64_t k, int64_t m) {
  std::vector<int8_t> codes(n * k + 64);
  for (auto& c : codes) do
      c = (int8_t)random_bits();
    while (c == -128);
  std::vector<float> scale(n + 64), bias(n + 64), x(m * k);
  for (auto& v : scale) v = 1.1f + random_float();
  for (auto& v : bias) v = random_float();
  for (auto& v : x) v = random_float();
  Linear a{};
  a.n = n, a.k = k, a.m = m, a.kind = Codes::int8, a.codes = (const uint8_t*)codes.data(), a.code_row = k;
  a.scale = scale.data(), a.bias = bias.data(), a.type = a.out_type = Type::f32, a.in.data = x.data(), a.in.stride = k;
  const std::vector<float> found = dynamic<dotprod::Level>(a);
  bool near = true;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double exact = bias[j], most = 0, rounding = 0;  // a token is rounded by half a step of its largest / 127
      for (int64_t l = 0; l < k; ++l) {
        exact += (double)x[i * k + l] * codes[j * k + l] * scale[j];
        most = std::fmax(most, std::fabs(x[i * k + l])), rounding += std::fabs(codes[j * k + l] * scale[j]);
      }
      near =
          near && std::fabs(found[i * n + j] - exact) <= 0.51 * most / 127 * rounding + 1e-5 * std::fabs(exact) + 1e-5;
    }
  check(near && same(dynamic<base::Level>(a), found), "W8A8", n, k, m);
}

}  // namespace

int main() {
  for (int64_t n : {1, 20, 37, 64})
    for (int64_t k : {64, 192, 1088})
      for (int64_t m : {1, 2, 3, 5, 7, 16, 33}) {
        check_product(Codes::int8, 0, "int8", n, k, m);
        check_product(Codes::int8g, 32, "int8, groups of 32", n, k, m);
        check_product(Codes::int8g, 64, "int8, groups of 64", n, k, m);
        check_product(Codes::affine4, 64, "affine4", n, k, m);
        check_product(Codes::affine4m, 32, "affine4m", n, k, m);
      }
  for (int64_t n : {1, 20, 37, 130})
    for (int64_t k : {1, 63, 64, 100, 1100})
      for (int64_t m : {1, 5, 32, 33, 70}) check_dynamic(n, k, m);
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return wrong > 0;
}
