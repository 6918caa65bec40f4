// Rebinds what a loaded ELF library imports: the slots that its own calls go through, so that no other library notices.
#include <bigkernels/pool.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <vector>

namespace bigkernels {
namespace {

// The relocations that put a function's plain address into a slot.
bool binds_address(uint32_t type) {
#if defined(__x86_64__)
  return type == R_X86_64_JUMP_SLOT || type == R_X86_64_GLOB_DAT || type == R_X86_64_64;
#elif defined(__aarch64__)
  return type == R_AARCH64_JUMP_SLOT || type == R_AARCH64_GLOB_DAT || type == R_AARCH64_ABS64;
#else
  return (void)type, false;
#endif
}

struct Search {
  const char* library;
  const Import* imports;
  int count;
  const char* reason;
};

// The symbol and relocation tables of a loaded library.
struct Tables {
  const ElfW(Sym) * symbols = nullptr;
  const char* names = nullptr;
  const ElfW(Rela) * relocations[2] = {};  // of data, and of the procedure linkage table
  size_t bytes[2] = {};

  explicit Tables(const dl_phdr_info& info) {
    const ElfW(Dyn)* entry = nullptr;
    for (int i = 0; i < info.dlpi_phnum; ++i)
      if (info.dlpi_phdr[i].p_type == PT_DYNAMIC)
        entry = (const ElfW(Dyn)*)(info.dlpi_addr + info.dlpi_phdr[i].p_vaddr);
    bool with_addends = true;
    // glibc has made these addresses absolute; other loaders leave them relative to the library.
    auto at = [&](ElfW(Addr) p) { return p < info.dlpi_addr ? info.dlpi_addr + p : p; };
    for (; entry && entry->d_tag != DT_NULL; ++entry) switch (entry->d_tag) {
        case DT_SYMTAB: symbols = (const ElfW(Sym)*)at(entry->d_un.d_ptr); break;
        case DT_STRTAB: names = (const char*)at(entry->d_un.d_ptr); break;
        case DT_RELA: relocations[0] = (const ElfW(Rela)*)at(entry->d_un.d_ptr); break;
        case DT_RELASZ: bytes[0] = entry->d_un.d_val; break;
        case DT_JMPREL: relocations[1] = (const ElfW(Rela)*)at(entry->d_un.d_ptr); break;
        case DT_PLTRELSZ: bytes[1] = entry->d_un.d_val; break;
        case DT_PLTREL: with_addends = entry->d_un.d_val == DT_RELA; break;
        default: break;
      }
    if (!with_addends) bytes[1] = 0;
    if (!symbols || !names) bytes[0] = bytes[1] = 0;
  }
};

// The loader has made the pages of some slots read-only (RELRO); they are so again afterwards.
bool write_slot(const dl_phdr_info& info, void** slot, void* value) {
  uintptr_t page = sysconf(_SC_PAGESIZE), begin = (uintptr_t)slot & ~(page - 1);
  bool sealed = false;
  for (int i = 0; i < info.dlpi_phnum; ++i) {
    const auto& part = info.dlpi_phdr[i];
    if (part.p_type != PT_GNU_RELRO) continue;
    uintptr_t first = info.dlpi_addr + part.p_vaddr;
    sealed |= begin >= (first & ~(page - 1)) && begin < ((first + part.p_memsz) & ~(page - 1));
  }
  if (sealed && mprotect((void*)begin, page, PROT_READ | PROT_WRITE)) return false;
  __atomic_store_n(slot, value, __ATOMIC_RELEASE);
  if (sealed) mprotect((void*)begin, page, PROT_READ);
  return true;
}

int visit(dl_phdr_info* info, size_t, void* data) {
  Search& search = *(Search*)data;
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* file = slash ? slash + 1 : info->dlpi_name;
  if (std::strncmp(file, search.library, std::strlen(search.library))) return 0;
  Tables tables(*info);
  struct Slot {
    void **place, *old, *value;
  };
  std::vector<Slot> slots;
  for (int i = 0; i < search.count; ++i) {
    size_t before = slots.size();
    for (int t = 0; t < 2; ++t)
      for (size_t r = 0; r < tables.bytes[t] / sizeof(ElfW(Rela)); ++r) {
        const auto& relocation = tables.relocations[t][r];
        if (!binds_address(ELF64_R_TYPE(relocation.r_info)) || relocation.r_addend) continue;
        const auto& symbol = tables.symbols[ELF64_R_SYM(relocation.r_info)];
        if (symbol.st_shndx != SHN_UNDEF || std::strcmp(tables.names + symbol.st_name, search.imports[i].name))
          continue;
        void** place = (void**)(info->dlpi_addr + relocation.r_offset);
        slots.push_back({place, *place, search.imports[i].function});
      }
    if (slots.size() == before) {
      search.reason = "torch's libc10.so does not import the allocation functions of the C library";
      return 1;
    }
  }
  search.reason = nullptr;
  for (size_t i = 0; i < slots.size(); ++i)
    if (!write_slot(*info, slots[i].place, slots[i].value)) {
      while (i--) write_slot(*info, slots[i].place, slots[i].old);
      search.reason = "the system does not let the imports of torch's libc10.so be written";
      return 1;
    }
  return 1;
}

}  // namespace

const char* rebind(const char* library, const Import* imports, int count) {
  Search search{library, imports, count, "torch's libc10.so is not loaded as a library of its own"};
  dl_iterate_phdr(visit, &search);
  return search.reason;
}

}  // namespace bigkernels
