#include "few_launch.cuh"

namespace bigkernels {
namespace cuda {

bool few_int8(const FewProduct& p, int device, FewLaunch* launch, cudaError_t* error) {
  return prepare<FewCode::int8>(p, device, launch, error);
}

}  // namespace cuda
}  // namespace bigkernels
