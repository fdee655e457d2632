// What linear_nll.cpp does with the logits of a tile and a panel, for the instruction set `Isa`.
#pragma once

#include "simd/product.inc.hpp"

namespace codeact {
namespace {

// A sum of 2^17 terms of 2^64 is still far from overflow; what is 2^126 below the reference is nothing beside it.
constexpr float kLag = 64.0F;

// softcap * tanh(z / softcap) = z' (1 - e) / (1 + e) with e = exp(-2 |z| / softcap): no overflow at either end.
inline Isa::Vec cap_softly(Isa::Vec z, float softcap) {
  const Isa::Vec e = exp2(Isa::multiply(Isa::absolute(z), Isa::broadcast(-2.0F * kLog2e / softcap)));
  const Isa::Vec one = Isa::broadcast(1.0F);
  const Isa::Vec size = Isa::divide(Isa::subtract(one, e), Isa::add(one, e));
  return Isa::multiply(Isa::copy_sign(size, z), Isa::broadcast(softcap));
}

// Moves the reference of a row up to its largest logit. Rare, so kept out of the loop.
[[gnu::noinline]] void move_reference(const Isa::Vec (&logits)[kVectors], float& reference, float* sums) {
  Isa::Vec largest = logits[0];
  for (int v = 1; v < kVectors; ++v) largest = Isa::max(largest, logits[v]);
  alignas(64) float values[kLanes];
  Isa::store(values, largest);
  float top = values[0];
  for (int lane = 1; lane < kLanes; ++lane) top = values[lane] > top ? values[lane] : top;
  Isa::store(sums, Isa::multiply(Isa::load(sums), exp2(Isa::broadcast((reference - top) * kLog2e))));
  reference = top;
}

template <bool kPlain>
inline void add_row(const float* z, const Finish& finish, std::int64_t column, float& target_logit, float& reference,
                    float* sums) {
  Isa::Vec logits[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    logits[v] = Isa::load(z + v * kLanes);
    if constexpr (!kPlain) {
      if (finish.bias) logits[v] = Isa::add(logits[v], Isa::load(finish.bias + v * kLanes));
      if (finish.softcap != 0) logits[v] = cap_softly(logits[v], finish.softcap);
      if (finish.mask) logits[v] = Isa::add(logits[v], Isa::load(finish.mask + v * kLanes));
    }
  }
  if (static_cast<std::uint64_t>(column) < kColumns) [[unlikely]] {
    alignas(64) float values[kColumns];
    for (int v = 0; v < kVectors; ++v) Isa::store(values + v * kLanes, logits[v]);
    target_logit = values[column];
  }
  // The difference first: it is exact where it matters, however large the logits are.
  const auto above_reference = [&](int v) {
    return Isa::multiply(Isa::subtract(logits[v], Isa::broadcast(reference)), Isa::broadcast(kLog2e));
  };
  Isa::Vec largest = above_reference(0);
  for (int v = 1; v < kVectors; ++v) largest = Isa::max(largest, above_reference(v));
  if (Isa::any_above(largest, Isa::broadcast(kLag))) [[unlikely]]
    move_reference(logits, reference, sums);
  Isa::Vec sum = Isa::load(sums);
  for (int v = 0; v < kVectors; ++v) sum = Isa::add(sum, exp2(above_reference(v)));
  Isa::store(sums, sum);
}

void accumulate(const std::uint32_t* tile, const std::uint32_t* panel, std::int64_t words, const Finish& finish,
                const std::int64_t* targets, float* target_logits, RowSums sums) {
  alignas(64) float logits[kRows][kColumns];
  multiply_packed(tile, panel, words, logits[0], kColumns);
  const bool plain = !finish.bias && !finish.mask && finish.softcap == 0;
  for (int r = 0; r < kRows; ++r) {
    float* row_sums = sums.sums + r * kLanes;
    if (plain)
      add_row<true>(logits[r], finish, targets[r] - finish.first_column, target_logits[r], sums.reference[r], row_sums);
    else
      add_row<false>(logits[r], finish, targets[r] - finish.first_column, target_logits[r], sums.reference[r],
                     row_sums);
  }
}

void add_lanes(const float* sums, std::int64_t rows, float* totals) {
  for (std::int64_t row = 0; row < rows; ++row) {
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += sums[row * kLanes + lane];
    totals[row] = total;
  }
}

}  // namespace
}  // namespace codeact
