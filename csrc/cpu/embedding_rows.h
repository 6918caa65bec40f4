// Rows of an embedding table in codes, as numbers: what bigkernels.nn.QuantizedEmbedding gives for them.
#pragma once
#include <bigkernels/table.h>

#include <vector>

namespace bigkernels {

// Row n in float32, each element rounded as plain PyTorch rounds it: (k,). `scales` is room that is used again.
void embedding_row(const Weight&, int64_t n, float* out, std::vector<float>& scales);

}  // namespace bigkernels
