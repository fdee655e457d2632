// Rows of a decoder layer between its products, for the instruction set `Isa`.
//
// Every step rounds as PyTorch's own chain of operations does, so that only sums differ, by their order.
#pragma once

#include "simd/product.inc.hpp"

namespace codeact {
namespace {

inline Isa::Vec rounded(Isa::Vec x, bool bfloat16) { return bfloat16 ? Isa::round_bfloat16(x) : x; }

void normalize_row(const unsigned char* row, const unsigned char* weight, std::int64_t columns, bool bfloat16,
                   float epsilon, unsigned char* target) {
  Isa::Vec sums = Isa::broadcast(0.0F);
  for (std::int64_t at = 0; at < columns; at += kLanes) {
    const Isa::Vec x = row_floats(row, at, columns, bfloat16);
    sums = Isa::fused(x, x, sums);
  }
  alignas(64) float values[kLanes];
  Isa::store(values, sums);
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += values[lane];
  const Isa::Vec scale = Isa::broadcast(1.0F / __builtin_sqrtf(sum / static_cast<float>(columns) + epsilon));
  for (std::int64_t at = 0; at < columns; at += kLanes) {
    const Isa::Vec x = rounded(Isa::multiply(row_floats(row, at, columns, bfloat16), scale), bfloat16);
    store_row_floats(Isa::multiply(x, row_floats(weight, at, columns, bfloat16)), target, at, columns, bfloat16);
  }
}

void gate_row(const unsigned char* gate, const unsigned char* up, std::int64_t columns, bool bfloat16,
              unsigned char* target) {
  const Isa::Vec one = Isa::broadcast(1.0F);
  for (std::int64_t at = 0; at < columns; at += kLanes) {
    // Below, a gate is shut. In this order a NaN stays.
    const Isa::Vec x = Isa::max(Isa::broadcast(-200.0F), row_floats(gate, at, columns, bfloat16));
    // exp(-x), at most 2^126.
    const Isa::Vec least = Isa::max(Isa::broadcast(-126.0F), Isa::multiply(x, Isa::broadcast(kLog2e)));
    const Isa::Vec e = exp2(Isa::subtract(Isa::broadcast(0.0F), least));
    const Isa::Vec silu = rounded(Isa::divide(x, Isa::add(one, e)), bfloat16);
    store_row_floats(Isa::multiply(silu, row_floats(up, at, columns, bfloat16)), target, at, columns, bfloat16);
  }
}

// The first half of a row turns against its second one, by an angle an element.
void rotate_row(const unsigned char* row, const unsigned char* cosine, const unsigned char* sine, std::int64_t columns,
                bool bfloat16, unsigned char* target) {
  const std::int64_t half = columns / 2;
  const std::int64_t bytes = bfloat16 ? 2 : 4;
  for (std::int64_t at = 0; at < half; at += kLanes) {
    const Isa::Vec first = row_floats(row, at, half, bfloat16);
    const Isa::Vec second = row_floats(row + half * bytes, at, half, bfloat16);
    const auto turned = [&](Isa::Vec own, Isa::Vec other, std::int64_t begin) {
      const Isa::Vec c = row_floats(cosine + begin * bytes, at, half, bfloat16);
      const Isa::Vec s = row_floats(sine + begin * bytes, at, half, bfloat16);
      return Isa::add(rounded(Isa::multiply(own, c), bfloat16), rounded(Isa::multiply(other, s), bfloat16));
    };
    store_row_floats(turned(first, Isa::subtract(Isa::broadcast(0.0F), second), 0), target, at, half, bfloat16);
    store_row_floats(turned(second, first, half), target + half * bytes, at, half, bfloat16);
  }
}

}  // namespace
}  // namespace codeact
