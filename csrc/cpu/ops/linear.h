// Linear layers over torch's threads, whatever the weight is stored as.
#pragma once
#include <bigkernels/stable.h>

namespace bigkernels {

constexpr int64_t kPackedBytes = int64_t{16} << 20;  // of packed tokens at once
// Tokens and columns of the result that a task makes.
constexpr int64_t kTokens = 512, kColumns = 256;

// Contiguous, with the leading sizes of x and rows of n elements.
Tensor empty_rows(const char* op, const Tensor& x, int64_t n);

// Fills out, forward for a few tokens, by reading the weight as it is stored.
void linear_few(const Linear&);
// Fills out, for any number of tokens.
void linear_many(const Linear&, bool backward);

}  // namespace bigkernels
