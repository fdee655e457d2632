// Products of rows as they lie with packed columns, for the instruction set `Isa`.
#pragma once

#include "simd/product.inc.hpp"

namespace codeact {
namespace {

template <int Vectors>
inline void multiply_some(const float* const* rows, std::int64_t features, const float* panel, float* products,
                          std::int64_t stride) {
  const auto row = [rows](std::int64_t word, int r) { return Isa::broadcast(rows[r][word]); };
  multiply<Vectors>(features, row, panel, kColumns, products, stride, Isa::fused);
}

// Only as many vectors of the last panel are multiplied as hold columns: ten centres are less than one.
void multiply_rows(const float* const* rows, std::int64_t features, const std::uint32_t* panels, std::int64_t columns,
                   float* products, std::int64_t stride) {
  for (std::int64_t first = 0; first < columns; first += kColumns) {
    const auto* panel = reinterpret_cast<const float*>(panels + first * features);
    if (columns - first <= kLanes)
      multiply_some<1>(rows, features, panel, products + first, stride);
    else if (columns - first <= 2 * kLanes)
      multiply_some<2>(rows, features, panel, products + first, stride);
    else
      multiply_some<kVectors>(rows, features, panel, products + first, stride);
  }
}

}  // namespace
}  // namespace codeact
