#include "attention/pieces.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace codeact {

void check_bounds(std::span<const std::int32_t> bounds, std::int64_t tokens) {
  bool rising = !bounds.empty() && bounds.front() == 0 && bounds.back() == tokens;
  for (std::size_t i = 1; i < bounds.size(); ++i) rising = rising && bounds[i - 1] <= bounds[i];
  if (!rising) throw std::invalid_argument("cu_seqlens must rise from 0 to " + std::to_string(tokens));
}

void check_prefixes(std::span<const std::int32_t> prefixes, std::size_t samples) {
  bool right = prefixes.empty() || prefixes.size() == samples;
  for (const std::int32_t prefix : prefixes) {
    const auto other = static_cast<std::size_t>(prefix);
    right = right && (prefix == -1 || (prefix >= 0 && other < samples && prefixes[other] == -1));
  }
  if (!right) throw std::invalid_argument("prefixes must name, for each sample, one that has no prefix, or be -1");
}

std::vector<std::size_t> longest_first(const std::vector<AttentionPiece>& pieces) {
  std::vector<std::size_t> order(pieces.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return pieces[a].work() > pieces[b].work(); });
  return order;
}

AttentionRows rows_of(const HeadsView& view, std::int64_t first_token, std::int64_t head) {
  return {reinterpret_cast<const unsigned char*>(view.data) + first_token * view.token_stride + head * view.head_stride,
          view.token_stride, view.head_stride};
}

AttentionPart part_of(const AttentionOperands& operands, const AttentionPiece& piece) {
  const std::int64_t heads_each = operands.queries.heads / operands.keys.heads;
  return {.queries = rows_of(operands.queries, piece.first, piece.group * heads_each),
          .keys = rows_of(operands.keys, piece.first, piece.group),
          .values = rows_of(operands.values, piece.first, piece.group),
          .prefix_keys = rows_of(operands.keys, piece.prefix, piece.group),
          .prefix_values = rows_of(operands.values, piece.prefix, piece.group),
          .before = piece.before,
          .begin = piece.begin,
          .end = piece.end,
          .width = operands.queries.width,
          .value_width = operands.values.width,
          .heads = static_cast<int>(heads_each),
          .bfloat16 = operands.element == Element::bfloat16,
          .scale = operands.scale};
}

}  // namespace codeact
