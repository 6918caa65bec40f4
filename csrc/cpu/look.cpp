// Where the tensors of a Python list are and how they lie, without a Python call for each: an optimizer asks that of
// 100,000 of them at every step. Through DLPack's C exchange API (https://dmlc.github.io/dlpack), which torch.Tensor
// has as a table of functions; the interpreter's function comes from the caller, so that this needs no Python to build.
#include <stdint.h>

namespace {

struct DLTensor {  // DLPack 1
  void* data;
  int32_t device_type, device_id, dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

constexpr int64_t kAhead = 6;  // tensors whose memory is asked for before its turn: most of the time is waiting for it

}  // namespace

#define BK_EXPORT extern "C" __attribute__((visibility("default")))

// With the interpreter's lock held, as from ctypes.PyDLL.
//
// addresses: (count,). hints: (count,), zeros at first: where the tensor's shape was last, beside which its other
// fields lie. layouts: of each tensor its device, dtype and number of dimensions in two words, its shape, and its
// strides.
//
// Where `compare` is zero the layouts are written, `room` words at most; returns how many there are, more than `room`
// if they do not fit. Otherwise they are compared with what is there: returns 0 where one differs; else 1, or 3 where
// the addresses are the same too. In both cases the addresses are written. -1 and a Python error for what is no tensor
// with an address.
BK_EXPORT int64_t bk_look(void* list, int64_t count, int (*describe)(void*, DLTensor*), void* (*item)(void*, int64_t),
                          int64_t* addresses, const char** hints, int64_t* layouts, int64_t room, int compare) {
  int64_t words = 0, moved = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + 2 * kAhead < count) __builtin_prefetch(item(list, i + 2 * kAhead));
    if (i + kAhead < count)
      for (int line = -2; line <= 2; ++line)
        __builtin_prefetch((const void*)((uintptr_t)hints[i + kAhead] + 64 * line));
    DLTensor t;
    if (describe(item(list, i), &t)) return -1;
    const int64_t address = (int64_t)t.data + (int64_t)t.byte_offset, dimensions = t.dimensions;
    moved |= addresses[i] ^ address;
    addresses[i] = address;
    hints[i] = (const char*)t.shape;
    const int64_t device = (int64_t)t.device_type << 32 | (uint32_t)t.device_id;
    const int64_t kind = dimensions << 32 | (int64_t)t.code << 24 | (int64_t)t.bits << 16 | t.lanes;
    int64_t* at = layouts + words;
    words += 2 + 2 * dimensions;
    if (words > room) {
      if (compare) return 0;
      continue;
    }
    if (compare) {
      int64_t other = (at[0] ^ device) | (at[1] ^ kind);
      if (other) return 0;  // before the number of dimensions is relied on
      int64_t empty = t.data != nullptr;
      for (int64_t d = 0; d < dimensions; ++d) empty |= t.shape[d] == 0;
      if (!empty) return 0;  // memory that was given back
      for (int64_t d = 0; d < dimensions; ++d)
        other |= (at[2 + d] ^ t.shape[d]) | (at[2 + dimensions + d] ^ t.strides[d]);
      if (other) return 0;
    } else {
      at[0] = device, at[1] = kind;
      for (int64_t d = 0; d < dimensions; ++d) at[2 + d] = t.shape[d], at[2 + dimensions + d] = t.strides[d];
    }
  }
  return compare ? words == room ? moved ? 1 : 3 : 0 : words;
}

// Whether memory holds what copies of it do: `count` ranges, each an address, that of its copy and a number of bytes.
BK_EXPORT int bk_same_bytes(const int64_t* ranges, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (__builtin_memcmp((const void*)ranges[3 * i], (const void*)ranges[3 * i + 1], (unsigned long)ranges[3 * i + 2]))
      return 0;
  return 1;
}

// Whether none of `count` integers of `size` bytes, 1 or 8, is zero.
BK_EXPORT int bk_all_set(const void* values, int64_t count, int64_t size) {
  if (size == 1) return !__builtin_memchr(values, 0, (unsigned long)count);
  const int64_t* words = (const int64_t*)values;
  for (int64_t i = 0; i < count; ++i)
    if (!words[i]) return 0;
  return 1;
}

// The first of the words [begin, count) that is not what it was, or `count`. Words are compared in their order: one
// that says where others are protects these. Plain reads of memory, for which no lock is needed.
BK_EXPORT int64_t bk_same_words(const int64_t* const* addresses, const int64_t* words, int64_t begin, int64_t count) {
  constexpr int64_t kFar = 32;  // cache lines under way: they are all over the heap
  for (int64_t i = begin; i < count; ++i) {
    if (i + kFar < count) __builtin_prefetch(addresses[i + kFar]);
    if (*addresses[i] != words[i]) return i;
  }
  return count;
}
