// An allocator for tests: torch's tensors and the workspaces of our kernels lie against pages that nobody may touch, so
// that a read or write outside of an allocation is a signal and not luck.
//
//   cc -O2 -shared -fPIC -o guard.so guard.c -ldl -lpthread;  GUARD=mixed LD_PRELOAD=./guard.so python ...
//
// GUARD says where an allocation lies on its pages:
//   end      its last byte is the last of its page: what reads one element too far stops
//   aligned  as near to the end as its alignment allows
//   begin    its first byte is the first of its page: what reads one element too early stops
//   mixed    one after the other
// The rest of its pages is filled with a pattern that is looked at when it is freed. Addresses are never used again:
// what is read after it was freed stops too. Fresh memory is all ones, which is NaN in every floating type.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { kOff, kEnd, kAligned, kBegin, kMixed };

#define PAGE 4096ull
#define RANGE (16ull << 40)
#define PATTERN 0xA5
#define FILLED (256u << 10)  // bytes of an allocation that are made NaN

// Of the page on which the memory that was asked for begins; size + 1, so that 0 is none.
typedef struct {
  uint64_t size_plus_one;
} Entry;

static uint8_t* range;
static Entry* entries;
static uint64_t used;  // pages
static int mode = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// Read by tests: how many allocations were made, and how many were written around.
long guard_allocations, guard_damaged;
// Set by tests: malloc as it was, for work that is not looked at.
int guard_paused;

extern void* __libc_memalign(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void __libc_free(void*);

static void start(void) {
  static const char* const names[] = {"", "end", "aligned", "begin", "mixed"};
  const char* wish = getenv("GUARD");
  mode = kOff;
  for (int i = kEnd; wish && i <= kMixed; ++i)
    if (!strcmp(wish, names[i])) mode = i;
  if (mode == kOff) return;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  range = mmap(NULL, RANGE, PROT_NONE, flags, -1, 0);
  entries = mmap(NULL, RANGE / PAGE * sizeof(Entry), PROT_READ | PROT_WRITE, flags, -1, 0);
  if (range == MAP_FAILED || entries == MAP_FAILED) {
    fprintf(stderr, "guard: no range of addresses\n");
    abort();
  }
}

static uint64_t pages_of(size_t size) { return size ? (size + PAGE - 1) / PAGE : 1; }
static int is_guarded(const void* p) { return range && (uint8_t*)p >= range && (uint8_t*)p < range + RANGE; }
static Entry* entry_of(const void* p) { return entries + ((uint8_t*)p - range) / PAGE; }
static uint8_t* page_of(const void* p) { return (uint8_t*)((uintptr_t)p & ~(uintptr_t)(PAGE - 1)); }

static void* guarded(size_t align, size_t size) {
  if (mode < 0) start();
  if (mode == kOff || guard_paused || align > PAGE) return NULL;
  pthread_mutex_lock(&lock);
  uint64_t pages = pages_of(size);
  uint8_t* first = range + (used + 1) * PAGE;  // after a page that stays closed, as the one behind does
  if ((used + pages + 2) * PAGE > RANGE || mprotect(first, pages * PAGE, PROT_READ | PROT_WRITE)) {
    pthread_mutex_unlock(&lock);
    return NULL;
  }
  used += pages + 1;
  int turn = guard_allocations % 4, place = mode;
  if (mode == kMixed) place = turn == 3 ? kBegin : turn == 2 ? kAligned : kEnd;
  uint8_t* end = first + pages * PAGE;
  uint8_t* memory = place == kBegin ? first : end - size;
  if (place == kAligned) memory = (uint8_t*)((uintptr_t)memory & ~(uintptr_t)(align - 1));
  if (memory == end) memory -= 1;  // of no bytes: an address of its own, on the last page
  memset(first, PATTERN, memory - first);
  memset(memory, 0xFF, size < FILLED ? size : FILLED);
  memset(memory + size, PATTERN, end - memory - size);
  entry_of(memory)->size_plus_one = size + 1;
  ++guard_allocations;
  pthread_mutex_unlock(&lock);
  return memory;
}

static int damaged(const uint8_t* from, const uint8_t* to, const uint8_t* memory, size_t size) {
  for (const uint8_t* p = from; p < to; ++p)
    if (*p != PATTERN) {
      fprintf(stderr, "guard: byte %td of an allocation of %zu bytes was written\n", p - memory, size);
      return 1;
    }
  return 0;
}

static void give_back(uint8_t* memory) {
  pthread_mutex_lock(&lock);
  Entry* entry = entry_of(memory);
  if (!entry->size_plus_one) {
    fprintf(stderr, "guard: %p is freed, and not allocated\n", (void*)memory);
    abort();
  }
  size_t size = entry->size_plus_one - 1;
  uint8_t *first = page_of(memory), *end = first + pages_of(size) * PAGE;
  if (damaged(first, memory, memory, size) | damaged(memory + size, end, memory, size)) ++guard_damaged;
  entry->size_plus_one = 0;
  mmap(first, end - first, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  pthread_mutex_unlock(&lock);
}

int posix_memalign(void** to, size_t align, size_t size) {
  void* memory = guarded(align, size);
  if (!memory) memory = __libc_memalign(align, size);
  if (!memory) return ENOMEM;
  *to = memory;
  return 0;
}

void* aligned_alloc(size_t align, size_t size) {
  void* memory = guarded(align, size);
  return memory ? memory : __libc_memalign(align, size);
}

void free(void* memory) {
  if (!is_guarded(memory)) return __libc_free(memory);
  int before = errno;
  give_back(memory);
  errno = before;
}

void* realloc(void* memory, size_t size) {
  if (!is_guarded(memory)) return __libc_realloc(memory, size);
  void* larger = malloc(size);
  if (!larger) return NULL;
  size_t old = entry_of(memory)->size_plus_one - 1;
  memcpy(larger, memory, old < size ? old : size);
  give_back(memory);
  return larger;
}
