// Causal attention of some queries of one sample, for the instruction set `Isa`: all scores of a tile of queries are
// made, and then used. Softmax and weighted sum are float32 throughout.
#pragma once

#include "simd/product.inc.hpp"

namespace codeact {
namespace {

constexpr int kValueVectors = 2;
constexpr int kValueColumns = kValueVectors * kLanes;

// exp((score - largest) * scale) of the first `seen` of `padded` scores, 0 for the others; returns their sum.
float softmax(float* scores, std::int64_t seen, std::int64_t padded, float scale) {
  for (std::int64_t key = seen; key < padded; ++key) scores[key] = -kInfinity;
  Isa::Vec largest = Isa::load(scores);
  for (std::int64_t key = kLanes; key < padded; key += kLanes) largest = Isa::max(largest, Isa::load(scores + key));
  alignas(64) float lanes[kLanes];
  Isa::store(lanes, largest);
  float top = lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) top = lanes[lane] > top ? lanes[lane] : top;
  const Isa::Vec factor = Isa::broadcast(scale * kLog2e);
  Isa::Vec sum = Isa::broadcast(0.0F);
  for (std::int64_t key = 0; key < padded; key += kLanes) {
    const Isa::Vec weight = exp2(Isa::multiply(Isa::subtract(Isa::load(scores + key), Isa::broadcast(top)), factor));
    sum = Isa::add(sum, weight);
    Isa::store(scores + key, weight);
  }
  for (std::int64_t key = seen; key < padded; ++key) scores[key] = 0;  // nearly 0 is not nothing
  Isa::store(lanes, sum);
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

template <class Byte>
Byte* row_at(const BasicAttentionRows<Byte>& rows, std::int64_t token, int head) {
  return rows.data + token * rows.stride + head * rows.head_stride;
}

// Tokens 0..end -> panels of words.
void pack_panels(const AttentionRows& rows, std::int64_t end, std::int64_t width, bool bfloat16,
                 std::uint32_t* panels) {
  for (std::int64_t first = 0; first < end; first += kColumns) {
    const auto count = static_cast<int>(end - first < kColumns ? end - first : kColumns);
    pack_panel(row_at(rows, first, 0), rows.stride, count, width, bfloat16, panels + first * words_of(width));
  }
}

// Tokens begin..end of a head -> floats (end - begin, stride), with zeros behind `width`; the stride is whole vectors.
void widen_rows(const AttentionRows& rows, int head, std::int64_t begin, std::int64_t end, std::int64_t width,
                bool bfloat16, float* floats, std::int64_t stride) {
  for (std::int64_t token = begin; token < end; ++token)
    for (std::int64_t column = 0; column < stride; column += kLanes)
      Isa::store(floats + (token - begin) * stride + column,
                 row_floats(row_at(rows, token, head), column, width, bfloat16));
}

// kRows tokens from `first` on, of which those from `end` on are zeros -> a tile.
void pack_tile(const AttentionRows& rows, int head, std::int64_t first, std::int64_t end, std::int64_t width,
               bool bfloat16, std::uint32_t* tile) {
  for (int r = 0; r < kRows; ++r)
    pack_row(first + r < end ? row_at(rows, first + r, head) : nullptr, width, bfloat16, r, tile);
}

constexpr std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

void attend(const AttentionPart& p, const WritableAttentionRows& output, const AttentionScratch& scratch) {
  const std::int64_t words = words_of(p.width);
  const std::int64_t padded = round_up(p.end, kColumns);
  const std::int64_t value_stride = round_up(p.value_width, kValueColumns);
  pack_panels(p.keys, p.end, p.width, p.bfloat16, scratch.keys);
  widen_rows(p.values, 0, 0, p.end, p.value_width, p.bfloat16, scratch.values, value_stride);

  for (int head = 0; head < p.heads; ++head) {
    for (std::int64_t first = p.begin; first < p.end; first += kRows) {
      const std::int64_t end = first + kRows < p.end ? first + kRows : p.end;  // of the queries, so of the keys as well
      pack_tile(p.queries, head, first, end, p.width, p.bfloat16, scratch.tile);
      for (std::int64_t key = 0; key < end; key += kColumns)
        multiply_packed(scratch.tile, scratch.keys + key * words, words, scratch.scores + key, padded);
      const std::int64_t used = round_up(end, kColumns);
      float totals[kRows];
      for (int r = 0; r < kRows; ++r) {
        const std::int64_t seen = first + r + 1 < used ? first + r + 1 : used;
        totals[r] = softmax(scratch.scores + r * padded, seen, used, p.scale);
      }
      const auto weight = [&](std::int64_t key, int r) { return Isa::broadcast(scratch.scores[r * padded + key]); };
      for (std::int64_t column = 0; column < value_stride; column += kValueColumns)
        multiply<kValueVectors>(end, weight, scratch.values + column, value_stride, scratch.output + column,
                                value_stride, Isa::fused);
      for (int r = 0; first + r < end; ++r) {
        float* row = scratch.output + r * value_stride;
        const Isa::Vec total = Isa::broadcast(totals[r]);
        for (std::int64_t column = 0; column < value_stride; column += kLanes)
          Isa::store(row + column, Isa::divide(Isa::load(row + column), total));
        store_elements(row, p.value_width, p.bfloat16, row_at(output, first + r, head));
      }
    }
  }
}

}  // namespace
}  // namespace codeact
