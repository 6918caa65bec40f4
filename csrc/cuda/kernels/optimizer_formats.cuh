// How parameters, gradients and states are stored: the formats of csrc/cpu/kernels/optimizer_formats.h, where they are
// explained, an element at a time. In integer arithmetic and not by a GPU's own conversions: a kernel that waits for
// memory has time for it, and the host build computes the same bits.
#pragma once
#include <bigkernels/update.h>

#include "halves.cuh"

namespace bigkernels {
namespace {

BK_DEVICE bool finite(float x) { return (as_bits(x) & 0x7f800000u) != 0x7f800000u; }

// ---- 8 bits ---------------------------------------------------------------------------------------------------------

BK_DEVICE int32_t fourth(bool sign) { return (sign ? 0x42ff0000 : 0x437f8000) - (0x3f800000 >> 2); }

BK_DEVICE float decode8(uint32_t byte, bool sign, float scale) {
  int32_t code = sign ? (int32_t)(int8_t)byte : (int32_t)byte, u = code < 0 ? -code : code;
  float value = as_float((uint32_t)((int32_t)as_bits((float)u + 0.5f) - fourth(sign)) << 2);
  // Beside a sign, what 0 would stand for is taken off, so that it stands for zero.
  if (sign) value = as_float(as_bits(value - 0x1.08p-32f) | ((uint32_t)code & 0x80000000u));
  return value * scale;
}

// `most`: the bits of the block's largest magnitude, compared as integers, so that infinity and NaN win. What has no
// reciprocal counts as zero.
BK_DEVICE float scale8(uint32_t most) { return most < 0x00800000u ? 0.0f : as_float(most); }
BK_DEVICE float inverse8(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

BK_DEVICE uint32_t encode8(float x, bool sign, float inverse) {
  float y = x * inverse;
  uint32_t bits = as_bits(y) & 0x7fffffffu;
  float magnitude = as_float((bits >> 2) + (uint32_t)fourth(sign));
  int32_t u = magnitude < 256.0f ? (int32_t)magnitude : 0;  // NaN, in a block that is lost anyway
  return (uint32_t)(sign && as_bits(y) >> 31 ? -u : u) & 0xffu;
}

// ---- 16 bits --------------------------------------------------------------------------------------------------------

// 16 random bits of element e. Elements e and e + 16 share a word, of which they take the low and the high half.
BK_DEVICE uint32_t random16(uint32_t key, int64_t e) {
  uint32_t word = mix((((uint32_t)e & ~16u) ^ key) ^ mix((uint32_t)(e >> 32)));
  return e & 16 ? word >> 16 : word & 0xffffu;
}

BK_DEVICE uint32_t stochastic_bf16(float x, uint32_t random) {
  return finite(x) ? (as_bits(x) + random) >> 16 : nearest_bf16(x);
}
// In whole units of the last place: 2^-24 where the result is subnormal, else what 13 bits of a float32 are.
BK_DEVICE uint32_t stochastic_f16(float x, uint32_t random) {
  uint32_t u = as_bits(x);
  float magnitude = as_float(u & 0x7fffffffu);
  if (magnitude < 0x1p-14f) {
    int32_t units = (int32_t)(magnitude * 0x1p24f + (as_float(random << 7 | 0x3f800000u) - 1.0f));
    x = as_float(as_bits((float)units * 0x1p-24f) | (u & 0x80000000u));
  } else if (finite(x)) {
    x = as_float((u + (random & 0x1fffu)) & ~0x1fffu);
  }
  return nearest_f16(x);
}

BK_DEVICE uint32_t narrow(float x, Type type, const OptimizerScalars& s, int64_t element) {
  if (s.rounding != (int)Rounding::stochastic) return type == Type::bf16 ? nearest_bf16(x) : nearest_f16(x);
  uint32_t random = random16(s.key, element);
  return type == Type::bf16 ? stochastic_bf16(x, random) : stochastic_f16(x, random);
}

// A float32 in a bfloat16 and a 16-bit remainder ("kahan").
BK_DEVICE float join(uint32_t high, uint32_t rest) {
  return as_float((high << 16) + (uint32_t)(int32_t)(int16_t)(uint16_t)rest);
}
BK_DEVICE uint32_t split(float x, uint32_t* rest) {
  uint32_t u = as_bits(x);
  if (x != x) u = (u | 0x400000u) & 0xffff0000u;
  uint32_t high = (u + 0x8000u) >> 16;
  *rest = (u - (high << 16)) & 0xffffu;
  return high;
}

}  // namespace
}  // namespace bigkernels
