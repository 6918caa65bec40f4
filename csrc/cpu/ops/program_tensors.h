// What the operators of step programs share: lists of records in tensors, and rows that come and go.
#pragma once
#include <bigkernels/runner.h>
#include <bigkernels/stable.h>

#include <cstring>

namespace bigkernels {
namespace {

#define BK_CHECK(condition, ...) STD_TORCH_CHECK(condition, "bigkernels::program: ", __VA_ARGS__)

template <class T>
const T* list_of(const char* name, const Tensor& t, int64_t* count) {
  BK_CHECK(t.is_cpu() && t.is_contiguous() && (t.scalar_type() == ScalarType::Long || sizeof(T) == 1), name,
           " is no list of records");
  const int64_t bytes = t.numel() * t.element_size();
  BK_CHECK(bytes % sizeof(T) == 0, name, " has half a record");
  *count = bytes / (int64_t)sizeof(T);
  return (const T*)t.const_data_ptr();
}

// The header, whose records and widths have to lie in the tensor, too.
const ProgramHeader* header_of(const Tensor& t) {
  BK_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::Byte &&
               t.numel() >= (int64_t)sizeof(ProgramHeader) && (uintptr_t)t.const_data_ptr() % 8 == 0,
           "no program");
  const char* begin = (const char*)t.const_data_ptr();
  const char* end = begin + t.numel();
  const auto* h = (const ProgramHeader*)begin;
  auto inside = [&](const void* p, int64_t count, int64_t size) {
    return count >= 0 && (const char*)p >= begin && (const char*)p <= end && count <= (end - (const char*)p) / size;
  };
  BK_CHECK(inside(h->record, h->records, sizeof(Record)) && inside(h->width, h->values, sizeof(int32_t)),
           "its records are elsewhere");
  return h;
}

Type float_type(const char* name, const Tensor& t) {
  check_cpu("program", name, t);
  return type_of(t);
}

struct Held {
  Place* run;
  ~Held() { program_finish(run); }
};

// Rows of float32 to a tensor of as many elements, and back. Torch's threads are asked only where it pays well: they
// spin for a while afterwards, on the team's cores.
constexpr int64_t kLarge = 1 << 20;  // elements

void check_out(const Tensor& to, int64_t n) {
  float_type("out", to);
  BK_CHECK(to.is_contiguous() && to.numel() == n, "the output does not fit");
}
void copy_out(const float* from, int64_t n, const Tensor& to) {
  const Type type = type_of(to);
  char* data = (char*)to.mutable_data_ptr();
  auto part = [&](int64_t begin, int64_t end) {
    char* at = data + begin * size_of(type);
    if (type == Type::f32)
      std::memcpy(at, from + begin, (end - begin) * 4);
    else
      table().convert(type, true, from + begin, at, end - begin);
  };
  if (n < kLarge) return part(0, n);
  torch::stable::parallel_for(0, n, kLarge / 8, part);
}

}  // namespace
}  // namespace bigkernels
