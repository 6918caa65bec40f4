// Which products of a few tokens there are kernels for.
#pragma once
#include "few_block.cuh"

namespace bigkernels {
namespace cuda {
namespace {

// Backward there are two kernels and not four: they take as long to compile, and training with so few tokens is rare.
template <FewCode kCode, FewOffset kOffset, int kGroup, Type kType, class F>
bool with_columns(const FewProduct& p, const F& f) {
  if (p.m < 1 || p.m > kMostFewTokens) return false;
  if (p.backward && p.m <= 16)
    f(Kind<kCode, kOffset, kGroup, kType, 2, true>());
  else if (p.backward)
    f(Kind<kCode, kOffset, kGroup, kType, 8, true>());
  else if (p.m <= 8)
    f(Kind<kCode, kOffset, kGroup, kType, 1, false>());
  else if (p.m <= 16)
    f(Kind<kCode, kOffset, kGroup, kType, 2, false>());
  else if (p.m <= 32)
    f(Kind<kCode, kOffset, kGroup, kType, 4, false>());
  else
    f(Kind<kCode, kOffset, kGroup, kType, 8, false>());
  return true;
}

template <FewCode kCode, FewOffset kOffset, int kGroup, class F>
bool with_type(const FewProduct& p, const F& f) {
  if (p.type == Type::bf16) return with_columns<kCode, kOffset, kGroup, Type::bf16>(p, f);
  if (p.type == Type::f16) return with_columns<kCode, kOffset, kGroup, Type::f16>(p, f);
  return false;
}

// Calls f with the kind of a product of this code; false: there is none.
template <FewCode kCode, class F>
bool with_kind(const FewProduct& p, const F& f) {
  constexpr FewOffset none = FewOffset::none, zero = FewOffset::zero, minimum = FewOffset::minimum;
  if constexpr (kCode == FewCode::int4) {
    if (p.offset == zero && p.group == 32) return with_type<kCode, zero, 32>(p, f);
    if (p.offset == zero && p.group == 64) return with_type<kCode, zero, 64>(p, f);
    if (p.offset == zero && p.group == 128) return with_type<kCode, zero, 128>(p, f);
    if (p.offset == minimum && p.group == 32) return with_type<kCode, minimum, 32>(p, f);
  } else if constexpr (kCode == FewCode::book4) {
    if (p.offset == none && p.group == 32) return with_type<kCode, none, 32>(p, f);
    if (p.offset == none && p.group == 64) return with_type<kCode, none, 64>(p, f);
    if (p.offset == none && p.group == 128) return with_type<kCode, none, 128>(p, f);
  } else {
    if (p.offset == none && p.group == 0) return with_type<kCode, none, 0>(p, f);
    if constexpr (kCode == FewCode::int8)
      if (p.offset == none && p.group == 32) return with_type<kCode, none, 32>(p, f);
  }
  return false;
}

}  // namespace
}  // namespace cuda
}  // namespace bigkernels
