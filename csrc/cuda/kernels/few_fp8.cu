#include "few_launch.cuh"

namespace bigkernels {
namespace cuda {

bool few_fp8(const FewProduct& p, int device, FewLaunch* launch, cudaError_t* error) {
  return prepare<FewCode::fp8>(p, device, launch, error);
}

}  // namespace cuda
}  // namespace bigkernels
