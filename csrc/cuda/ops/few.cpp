// Linear layers of a few tokens on a GPU: tensors to the kernels' arguments, and counters that are zero.
#include <bigkernels/stable_cuda.h>
// After it, as torch's headers come first.
#include <bigkernels/cuda.h>

#include <map>
#include <memory>
#include <mutex>
#include <tuple>

namespace bigkernels {
namespace cuda {
namespace {

void ok(const char* error) { STD_TORCH_CHECK(!error, "bigkernels::quantized_few: ", error); }

// Counters that are zero before and after each launch: launches that come one after the other share them, those of a
// stream or of a stream in one capture. A graph has them as long as it lives, which nobody tells, so that what a
// capture took is not given back; where all are taken, a launch has counters of its own, which cost it another node to
// clear.
class Counters {
 public:
  // Null where there are none left, or this is the first call and cannot wait for them to be cleared.
  int* find(int count, int device, void* stream) {
    bool capturing;
    uint64_t capture;
    ok(capture_of(stream, device, &capturing, &capture));
    if (stream == kPerThread) return nullptr;  // one handle, another stream in each thread
    const std::lock_guard<std::mutex> lock(mutex_);
    Place& place = places_[{device, stream, capture}];
    if (place.count >= count) return place.first;
    Arena& arena = arenas_[device];
    if (!arena.memory) {
      if (capturing) return nullptr;
      auto memory = std::make_unique<Workspace>(kAll * (int64_t)sizeof(int), device);
      ok(zero(memory->data(), kAll * (int64_t)sizeof(int), device, stream));
      ok(wait_for(device, stream));  // for the other streams
      arena.memory = std::move(memory);
    }
    const int taken = (count + kAtOnce - 1) / kAtOnce * kAtOnce;
    if (arena.used + taken > kAll) return nullptr;
    place = {(int*)arena.memory->data() + arena.used, taken};
    arena.used += taken;
    return place.first;
  }

 private:
  static constexpr int kAll = 1 << 18, kAtOnce = 512;
  static inline void* const kPerThread = (void*)2;
  struct Place {
    int* first = nullptr;
    int count = 0;
  };
  struct Arena {
    std::unique_ptr<Workspace> memory;
    int used = 0;
  };
  std::mutex mutex_;
  std::map<std::tuple<int, void*, uint64_t>, Place> places_;
  std::map<int, Arena> arenas_;
};

// Never destroyed: its memory is torch's, which may be gone by then.
Counters& counters() {
  static Counters* all = new Counters;
  return *all;
}

Type type_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: STD_TORCH_CHECK(false, "bigkernels::quantized_few: ", name, " has no dtype with kernels");
  }
  return Type::f32;
}

const void* operand(const char* name, const MaybeTensor& t, int64_t count, int32_t device) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == device && t->is_contiguous() && t->numel() == count,
                  "bigkernels::quantized_few: ", name, " must be contiguous, of ", count, " elements, beside x");
  return t->const_data_ptr();
}

const float* floats(const char* name, const MaybeTensor& t, int64_t count, int32_t device) {
  STD_TORCH_CHECK(!t || t->scalar_type() == ScalarType::Float, "bigkernels::quantized_few: ", name, " must be float32");
  return (const float*)operand(name, t, count, device);
}

// Tokens (or gradients), the weight and the result, whose sizes are n and k.
FewProduct product(const Tensor& x, const Tensor& units, const MaybeTensor& book, int64_t code, int64_t offset,
                   int64_t group, Tensor& out, bool backward) {
  const int32_t device = x.get_device_index();
  STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2 && out.is_contiguous() && out.size(0) == x.size(0),
                  "bigkernels::quantized_few: x and out must be matrices of as many tokens");
  FewProduct p;
  p.backward = backward;
  const int64_t m = x.size(0), depth = x.size(1), rows = out.size(1), n = backward ? depth : rows,
                k = backward ? rows : depth;
  STD_TORCH_CHECK(m <= kMostFewTokens && n < 1 << 30 && k < 1 << 30, "bigkernels::quantized_few: too large");
  p.m = (int)m, p.n = (int)n, p.k = (int)k;
  STD_TORCH_CHECK(code >= 0 && code <= (int)FewCode::fp8 && offset >= 0 && offset <= (int)FewOffset::minimum,
                  "bigkernels::quantized_few: no such format");
  p.code = (FewCode)code, p.offset = (FewOffset)offset, p.group = (int)group;
  p.type = type_of("x", x);
  p.wide = out.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(p.type != Type::f32 && (p.wide || out.scalar_type() == x.scalar_type()),
                  "bigkernels::quantized_few: x must have 16 bits, and out its dtype or float32");
  p.x = x.const_data_ptr(), p.stride = x.stride(0);
  STD_TORCH_CHECK(
      !m || (depth > 0 && depth % 8 == 0 && x.stride(1) == 1 && p.stride % 8 == 0 && (uintptr_t)p.x % 16 == 0),
      "bigkernels::quantized_few: rows of x must be multiples of 16 bytes, and begin at such");
  const bool four = p.code == FewCode::int4 || p.code == FewCode::book4;
  const int64_t unit = 128 * (four ? 8 : 16) + (group ? 64 * (128 / group) : 0);
  p.weight = operand("units", units, (n + 63) / 64 * 4 * ((k + 127) / 128) * unit, device);
  STD_TORCH_CHECK(units.element_size() == 1 && (uintptr_t)p.weight % 16 == 0,
                  "bigkernels::quantized_few: units must be bytes, from a multiple of 16 on");
  p.book = floats("book", book, 16, device);
  STD_TORCH_CHECK(p.book || p.code != FewCode::book4, "bigkernels::quantized_few: a code without its book");
  STD_TORCH_CHECK(out.is_cuda() && out.get_device_index() == device, "bigkernels::quantized_few: out is elsewhere");
  p.out = out.mutable_data_ptr();
  return p;
}

void launch(const FewProduct& p, int32_t device) {
  if (p.m == 0 || p.n == 0 || p.k == 0) return;
  void* stream = current_stream(device);
  int64_t bytes;
  int count;
  ok(few_product_needs(p, device, &bytes, &count));
  int* zeros = counters().find(count, device, stream);
  const int64_t own = zeros ? 0 : count * (int64_t)sizeof(int);
  Workspace workspace(bytes + own, device);
  if (!zeros) {
    zeros = (int*)((char*)workspace.data() + bytes);
    ok(zero(zeros, own, device, stream));
  }
  ok(few_product(p, workspace.data(), zeros, device, stream));
}

void few(Tensor x, Tensor units, MaybeTensor factor, MaybeTensor book, MaybeTensor bias, int64_t code, int64_t offset,
         int64_t group, Tensor out) {
  const int32_t device = x.get_device_index();
  DeviceGuard guard(device);
  FewProduct p = product(x, units, book, code, offset, group, out, false);
  p.factor = floats("factor", factor, p.n, device);
  p.bias = operand("bias", bias, p.n, device);
  if (bias) p.bias_type = type_of("bias", *bias);
  launch(p, device);
}

void few_back(Tensor grad, Tensor units, MaybeTensor book, MaybeTensor top, int64_t code, int64_t offset, int64_t group,
              Tensor out) {
  const int32_t device = grad.get_device_index();
  DeviceGuard guard(device);
  FewProduct p = product(grad, units, book, code, offset, group, out, true);
  p.top = floats("top", top, 1, device);
  launch(p, device);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CUDA, m) {
  m.impl("quantized_few", TORCH_BOX(&few));
  m.impl("quantized_few_bwd", TORCH_BOX(&few_back));
}

}  // namespace cuda
}  // namespace bigkernels
