// The loss of every row of logits, and its slope in their place.
//
// R rows (tokens), V logits of a row (the vocabulary).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "simd/instruction_sets.hpp"

namespace codeact {

struct LossSlope {
  Element element;    // of the logits
  std::byte* logits;  // (R, V) without the bias and the softcap; in and out
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t row_stride;      // bytes
  const std::int64_t* targets;  // (R,), each in 0..V-1 or ignore_index
  const float* bias;            // (V,) or null
  std::optional<float> softcap;
  std::int64_t ignore_index;
  const float* scale;  // (R,) or null: what the slopes of a row are multiplied by
  bool slope;          // whether the logits become d loss / d logit; else they stay
  float* losses;       // (R,), out
};

// losses[r] = log(sum_v exp(z_rv)) - z_r,target with z = softcap(logits + bias), and where `slope` says so
// logits[r, v] = scale[r] * (exp(z_rv - lse_r) - [v is the target]) * (1 - (z_rv / softcap)^2), rounded to the element;
// both 0 for an ignored row.
//
// A row is read by one thread and in one order: its bits depend on nothing else. At most `threads` threads run, the
// caller's included. Throws std::invalid_argument for a target out of range (named by its position) or an instruction
// set that is not here.
void loss_and_slope(const LossSlope& problem, int threads, std::string_view instruction_set);

}  // namespace codeact
