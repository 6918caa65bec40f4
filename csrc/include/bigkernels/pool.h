// Memory for large CPU tensors that is used again when they are freed. Free of torch.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bigkernels {

struct PoolStats {
  int64_t in_use;      // bytes of live blocks
  int64_t cached;      // bytes of free blocks whose pages the process still has
  int64_t reserved;    // bytes of addresses opened so far, with pages or without
  int64_t peak;        // the most that in_use has been
  int64_t hits;        // blocks taken from cached bytes alone
  int64_t misses;      // blocks that needed new pages
  int64_t given_back;  // bytes whose pages went back to the system
};

// Puts the pool in the place of what libc10.so imports as posix_memalign and free. `limit`: the most cached bytes.
// Returns null, or why it cannot be. Called again, it changes the limit and what is asked for new pages.
const char* pool_on(int64_t limit, bool huge_pages);
// New memory is malloc's again. Live blocks stay where they are, and what is freed of them goes back to the system.
void pool_off();
int64_t pool_trim();  // gives cached pages back; how many bytes
PoolStats pool_stats();
bool pool_owns(const void*);

// Writes `function` into every slot of the loaded library `library` (the start of its file's name) that is bound to the
// import `name`. Returns null, or why not; then nothing has been written.
struct Import {
  const char* name;
  void* function;
};
const char* rebind(const char* library, const Import* imports, int count);

}  // namespace bigkernels
