// Pieces of the work of varlen attention, forward and backward.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "attention/attention.hpp"
#include "simd/kernels.inc.hpp"

namespace codeact {

// Some queries of one sample, with all heads that share one head of keys and values.
struct AttentionPiece {
  std::int64_t first;  // token of the sample, in the pack
  std::int64_t begin;  // queries, in the sample
  std::int64_t end;
  std::int64_t group;       // head of keys and values
  std::int64_t prefix = 0;  // its first token, in the pack
  std::int64_t before = 0;  // its tokens

  double work() const { return static_cast<double>(end - begin) * static_cast<double>(end + begin + 2 * before); }
};

inline std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

// Throws std::invalid_argument for bounds that do not rise from 0 to the tokens.
void check_bounds(std::span<const std::int32_t> bounds, std::int64_t tokens);

// Throws std::invalid_argument unless there is one for each of `samples`, or none: a sample without prefix, or -1.
void check_prefixes(std::span<const std::int32_t> prefixes, std::size_t samples);

// In which order to take pieces, so that threads which share them end together: the longest first.
std::vector<std::size_t> longest_first(const std::vector<AttentionPiece>& pieces);

// Those of one sample, from a head on.
AttentionRows rows_of(const HeadsView& view, std::int64_t first_token, std::int64_t head);

// What the kernels get to know of a piece, its output aside.
AttentionPart part_of(const AttentionOperands& operands, const AttentionPiece& piece);

}  // namespace codeact
