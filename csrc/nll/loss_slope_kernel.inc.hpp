// What loss_slope.cpp does with a row of logits, for the instruction set `Isa`.
#pragma once

#include "nll/linear_nll_kernel.inc.hpp"

namespace codeact {
namespace {

// As many logits as a vector has, from `first` on; -infinity past the end of the row.
inline Isa::Vec finished_logits(const LogitsRow& row, std::int64_t first) {
  Isa::Vec z = row_floats(row.data, first, row.columns, row.bfloat16);
  if (row.bias) {
    const auto* bias = reinterpret_cast<const unsigned char*>(row.bias);
    z = Isa::add(z, row_floats(bias, first, row.columns, false));
  }
  if (row.softcap != 0) z = cap_softly(z, row.softcap);
  if (first + kLanes > row.columns) [[unlikely]] {
    alignas(64) float values[kLanes];
    Isa::store(values, z);
    for (std::int64_t lane = row.columns - first; lane < kLanes; ++lane) values[lane] = -kInfinity;
    z = Isa::load(values);
  }
  return z;
}

RowTotal total_row(const LogitsRow& row) {
  alignas(64) float values[kLanes];
  Isa::Vec tops = Isa::broadcast(-kInfinity);
  // In this order a NaN is passed over here, and found by the sum.
  for (std::int64_t at = 0; at < row.columns; at += kLanes) tops = Isa::max(finished_logits(row, at), tops);
  Isa::store(values, tops);
  float largest = values[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = values[lane] > largest ? values[lane] : largest;

  Isa::Vec sums = Isa::broadcast(0.0F);
  for (std::int64_t at = 0; at < row.columns; at += kLanes) {
    const Isa::Vec below = Isa::subtract(finished_logits(row, at), Isa::broadcast(largest));
    sums = Isa::add(sums, exp2(Isa::multiply(below, Isa::broadcast(kLog2e))));
  }
  Isa::store(values, sums);
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += values[lane];

  const std::int64_t place = row.target % kLanes;
  Isa::store(values, finished_logits(row, row.target - place));
  return {.largest = largest, .sum = sum, .target_logit = values[place]};
}

void slope_row(const LogitsRow& row, const RowTotal& total, float scale) {
  const Isa::Vec share = Isa::broadcast(1.0F / total.sum);
  const Isa::Vec factor = Isa::broadcast(scale);
  for (std::int64_t at = 0; at < row.columns; at += kLanes) {
    const Isa::Vec z = finished_logits(row, at);
    const Isa::Vec below = Isa::subtract(z, Isa::broadcast(total.largest));
    Isa::Vec slope = Isa::multiply(exp2(Isa::multiply(below, Isa::broadcast(kLog2e))), share);
    if (static_cast<std::uint64_t>(row.target - at) < static_cast<std::uint64_t>(kLanes)) [[unlikely]] {
      alignas(64) float values[kLanes];
      Isa::store(values, slope);
      values[row.target - at] -= 1.0F;
      slope = Isa::load(values);
    }
    if (row.softcap != 0) {  // d tanh = 1 - tanh^2, and the logits are softcap * tanh
      const Isa::Vec tanh = Isa::divide(z, Isa::broadcast(row.softcap));
      slope = Isa::multiply(slope, Isa::subtract(Isa::broadcast(1.0F), Isa::multiply(tanh, tanh)));
    }
    store_row_floats(Isa::multiply(slope, factor), row.data, at, row.columns, row.bfloat16);
  }
}

}  // namespace
}  // namespace codeact
