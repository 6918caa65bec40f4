// Helpers over LibTorch's stable ABI for the CUDA bindings. Before all other torch headers.
#pragma once
#define USE_CUDA 1  // the shim's CUDA functions; needs none of CUDA's headers
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

// A torch without CUDA has no such function. Weak, so that the library loads beside it, where nothing calls it.
#pragma weak aoti_torch_get_current_cuda_stream

namespace bigkernels {
namespace cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using MaybeTensor = std::optional<Tensor>;

inline void* current_stream(int32_t device) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr,
                  "bigkernels: the torch that is loaded has no CUDA streams; its CUDA libraries are not loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Memory that a kernel works in, from torch's allocator: what is queued on the current stream may use it, and it may be
// given back before that has run.
class Workspace {
 public:
  Workspace(int64_t bytes, int32_t device) : tensor_(allocate(bytes, device)) {}
  void* data() const { return tensor_.mutable_data_ptr(); }

 private:
  static Tensor allocate(int64_t bytes, int32_t device) {
    int64_t one = 1;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &bytes, &one, aoti_torch_dtype_uint8(),
                                                    aoti_torch_device_type_cuda(), device, &handle));
    return Tensor(handle);
  }
  Tensor tensor_;
};

}  // namespace cuda
}  // namespace bigkernels
