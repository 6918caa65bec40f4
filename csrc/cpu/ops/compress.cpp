#include <bigkernels/stable.h>

namespace bigkernels {
namespace {

constexpr const char* kOp = "compress";

void run(const Compress& a, Kernel<Compress> kernel) {
  int64_t blocks = (a.n + kCompressBlock - 1) / kCompressBlock;
  parallel_rows(blocks, kCompressBlock * (1 + size_of(a.type)),
                [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

std::tuple<Tensor, Tensor> compress(Tensor x, bool fp8, bool stochastic, int64_t key) {
  check_cpu(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() == 1 && (x.size(0) <= 1 || x.stride(0) == 1), "bigkernels::", kOp, ": x must be flat");
  Compress a{};
  a.n = x.size(0), a.type = type_of(x), a.fp8 = fp8, a.stochastic = stochastic, a.key = (uint32_t)key;
  int64_t one = 1;
  Tensor codes = empty_strided(&a.n, &one, 1, ScalarType::Byte, a.n);
  Tensor scale = empty_1d((a.n + kCompressBlock - 1) / kCompressBlock);
  a.values = const_cast<void*>(x.const_data_ptr());
  a.codes = (uint8_t*)codes.mutable_data_ptr(), a.scale = (float*)scale.mutable_data_ptr();
  run(a, table().compress);
  return {codes, scale};
}

Tensor decompress(Tensor codes, Tensor scale, bool fp8, ScalarType dtype) {
  check_cpu(kOp, "codes", codes);
  check_cpu(kOp, "scale", scale);
  Compress a{};
  a.n = codes.numel(), a.fp8 = fp8;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.is_contiguous() && scale.is_contiguous() &&
                      scale.scalar_type() == ScalarType::Float &&
                      scale.numel() == (a.n + kCompressBlock - 1) / kCompressBlock,
                  "bigkernels::decompress: codes and scale do not fit");
  int64_t one = 1;
  Tensor out = empty_strided(&a.n, &one, 1, dtype, a.n * (dtype == ScalarType::Float ? 4 : 2));
  a.type = type_of(out), a.values = out.mutable_data_ptr();
  a.codes = (uint8_t*)const_cast<void*>(codes.const_data_ptr());
  a.scale = (float*)const_cast<void*>(scale.const_data_ptr());
  a.stream = worth_streaming(out, kCompressBlock * size_of(a.type), a.n * size_of(a.type));
  run(a, table().decompress);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("compress", TORCH_BOX(&compress));
  m.impl("decompress", TORCH_BOX(&decompress));
}

}  // namespace bigkernels
