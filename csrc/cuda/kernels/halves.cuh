// Floats of 16 bits in integer arithmetic, the same bits on a GPU and in a host build.
#pragma once
#include <bigkernels/table.h>

#include "lanes.cuh"

namespace bigkernels {
namespace {

BK_DEVICE float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
BK_DEVICE uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

BK_DEVICE float widen_bf16(uint32_t half) { return as_float(half << 16); }
BK_DEVICE float widen_f16(uint32_t half) {
  // The exponent is rebased by a multiplication, which also normalises the subnormal numbers.
  uint32_t magnitude = half & 0x7fffu;
  uint32_t value = as_bits(as_float(magnitude << 13) * 0x1p112f);
  return as_float(value | (magnitude > 0x7bffu ? 0x7f800000u : 0u) | (half & 0x8000u) << 16);
}
BK_DEVICE float widen(uint32_t half, Type type) { return type == Type::bf16 ? widen_bf16(half) : widen_f16(half); }

BK_DEVICE uint32_t nearest_bf16(float x) {
  uint32_t u = as_bits(x);
  return x != x ? u >> 16 | 0x40u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}
BK_DEVICE uint32_t nearest_f16(float x) {
  uint32_t u = as_bits(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu, r;
  if (magnitude > 0x7f800000u) {
    r = (magnitude >> 13 & 0x3ffu) | 0x7e00u;
  } else if (magnitude < 0x38800000u) {
    r = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds to what is subnormal
  } else {
    r = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    r = r > 0x7c00u ? 0x7c00u : r;
  }
  return r | sign;
}

}  // namespace
}  // namespace bigkernels
