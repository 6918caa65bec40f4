// Chooses the ISA level once, from what the machine has and what BIGKERNELS_CPU_ISA allows.
#include <bigkernels/layers.h>

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bigkernels {
namespace {

const char* const kNames[] = {"base", "avx2", "avx512", "amx"};

#if defined(__x86_64__)
// Linux gives the tile registers only to a process that asks (ARCH_REQ_XCOMP_PERM for XTILEDATA).
bool amx_permitted() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

Isa best() {
  __builtin_cpu_init();
#define BK_HAS(feature) __builtin_cpu_supports(feature)
  if (!(BK_HAS("avx2") && BK_HAS("fma") && BK_HAS("f16c"))) return Isa::base;
  if (!(BK_HAS("avx512f") && BK_HAS("avx512bw") && BK_HAS("avx512vl") && BK_HAS("avx512dq") && BK_HAS("avx512vnni") &&
        BK_HAS("avx512bf16")))
    return Isa::avx2;
  if (!(BK_HAS("amx-tile") && BK_HAS("amx-bf16") && BK_HAS("amx-int8") && amx_permitted())) return Isa::avx512;
#undef BK_HAS
  return Isa::amx;
}
#else
Isa best() { return Isa::base; }
#endif

Isa choose() {
  Isa found = best();
  if ((int)found > BK_MAX_ISA_LEVEL) found = (Isa)BK_MAX_ISA_LEVEL;  // what this compiler could build
  const char* wish = std::getenv("BIGKERNELS_CPU_ISA");
  if (!wish || !*wish) return found;
  for (int i = 0; i < (int)std::size(kNames); ++i)
    if (!std::strcmp(wish, kNames[i])) return i < (int)found ? (Isa)i : found;  // only downwards
  throw std::runtime_error(std::string("bigkernels: BIGKERNELS_CPU_ISA is '") + wish +
                           "'; accepted are base, avx2, avx512 and amx");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() { return kNames[(int)isa()]; }

#if BK_MAX_ISA_LEVEL >= 3
#define BK_ALL_LEVELS(name) {&base::name, &avx2::name, &avx512::name, &amx::name}
#elif BK_MAX_ISA_LEVEL == 2
#define BK_ALL_LEVELS(name) {&base::name, &avx2::name, &avx512::name}
#elif BK_MAX_ISA_LEVEL == 1
#define BK_ALL_LEVELS(name) {&base::name, &avx2::name}
#else
#define BK_ALL_LEVELS(name) {&base::name}
#endif

const CpuTable& table() {
  static const CpuTable* const tables[] = BK_ALL_LEVELS(table);
  static const CpuTable* const chosen = tables[(int)isa()];
  return *chosen;
}

const LayerTable& layer_table() {
  static const LayerTable* const tables[] = BK_ALL_LEVELS(layer_table);
  static const LayerTable* const chosen = tables[(int)isa()];
  return *chosen;
}

const ProgramTable& program_table() {
  static const ProgramTable* const tables[] = BK_ALL_LEVELS(program_table);
  static const ProgramTable* const chosen = tables[(int)isa()];
  return *chosen;
}

}  // namespace bigkernels
