#include "few_launch.cuh"

namespace bigkernels {
namespace cuda {

bool few_int4(const FewProduct& p, int device, FewLaunch* launch, cudaError_t* error) {
  return prepare<FewCode::int4>(p, device, launch, error);
}

}  // namespace cuda
}  // namespace bigkernels
