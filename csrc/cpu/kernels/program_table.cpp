// This level's kernels of the step program.
#include <bigkernels/program.h>
#include <bigkernels/vec.h>

namespace bigkernels {
namespace BK_ISA {

extern const ProgramTable program_table = {
    nullptr,  // norm
    nullptr,  // combine
    nullptr,  // activate
    nullptr,  // product_form
    nullptr,  // product_ready
    nullptr,  // product_prepare
    nullptr,  // product_workspace
    nullptr,  // product
    nullptr,  // heads
    nullptr,  // attend_plan
    nullptr,  // attend
    nullptr,  // attend_merge
};

}  // namespace BK_ISA
}  // namespace bigkernels
