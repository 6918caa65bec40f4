// Chooses the ISA level once, from what the machine has and what BIGKERNELS_CPU_ISA allows.
#include <bigkernels/layers.h>
#include <bigkernels/program.h>

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace bigkernels {

// All levels, lowest first. Kernels know nothing of those beside their own: a new one leaves their objects as they are.
#if defined(__x86_64__)
#define BK_LEVELS(X) X(base) X(avx2) X(avx512_vnni) X(avx512) X(amx)
#elif defined(__aarch64__)
#define BK_LEVELS(X) X(base) X(dotprod)
#else
#define BK_LEVELS(X) X(base)
#endif

#define BK_DECLARE(level)                  \
  namespace level {                        \
  extern const CpuTable table;             \
  extern const LayerTable layer_table;     \
  extern const ProgramTable program_table; \
  }
BK_LEVELS(BK_DECLARE)
#undef BK_DECLARE

namespace {

#define BK_ENTRY(level) level,
enum class Isa : int { BK_LEVELS(BK_ENTRY) };
#undef BK_ENTRY

#define BK_NAME(level) #level,
const char* const kNames[] = {BK_LEVELS(BK_NAME)};  // by Isa
#undef BK_NAME

struct Level {
  Isa isa;
  const CpuTable* table;
  const LayerTable* layers;
  const ProgramTable* program;
};

// Lowest first; BK_BUILT_LEVELS names those that this compiler could build.
#define BK_LEVEL(level) {Isa::level, &level::table, &level::layer_table, &level::program_table},
const Level kBuilt[] = {BK_BUILT_LEVELS(BK_LEVEL)};
#undef BK_LEVEL

#if defined(__x86_64__)
bool has_tiles() {
#if defined(BK_EMULATED_TILES)  // tests/tiles_on_host
  return true;
#elif defined(__linux__)
  if (!(__builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8")))
    return false;
  // Linux gives the tile registers only to a process that asks (ARCH_REQ_XCOMP_PERM for XTILEDATA).
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

Isa best() {
  __builtin_cpu_init();
#define BK_HAS(feature) __builtin_cpu_supports(feature)
  if (!(BK_HAS("avx2") && BK_HAS("fma") && BK_HAS("f16c"))) return Isa::base;
  if (!(BK_HAS("avx512f") && BK_HAS("avx512bw") && BK_HAS("avx512vl") && BK_HAS("avx512dq") && BK_HAS("avx512vnni")))
    return Isa::avx2;
  if (!BK_HAS("avx512bf16")) return Isa::avx512_vnni;
  if (!has_tiles()) return Isa::avx512;
#undef BK_HAS
  return Isa::amx;
}
#elif defined(__aarch64__) && defined(__linux__)
Isa best() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? Isa::dotprod : Isa::base; }
#else
Isa best() { return Isa::base; }
#endif

Isa allowed() {
  const Isa found = best();
  const char* wish = std::getenv("BIGKERNELS_CPU_ISA");
  if (!wish || !*wish) return found;
  std::string names;
  for (int i = 0; i < (int)std::size(kNames); ++i) {
    if (!std::strcmp(wish, kNames[i])) return i < (int)found ? (Isa)i : found;  // only downwards
    names += (i == 0 ? "" : i + 1 == (int)std::size(kNames) ? " and " : ", ") + std::string(kNames[i]);
  }
  throw std::runtime_error(std::string("bigkernels: BIGKERNELS_CPU_ISA is '") + wish + "'; accepted are " + names);
}

const Level* choose() {
  const Isa most = allowed();
  const Level* chosen = kBuilt;
  for (const Level& level : kBuilt)
    if (level.isa <= most) chosen = &level;
  return chosen;
}

const Level& chosen() {
  static const Level* const level = choose();
  return *level;
}

}  // namespace

const char* isa_name() { return kNames[(int)chosen().isa]; }
const CpuTable& table() { return *chosen().table; }
const LayerTable& layer_table() { return *chosen().layers; }
const ProgramTable& program_table() { return *chosen().program; }

}  // namespace bigkernels
