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

// The keys of the prefix and those of the sample up to `end`, laid end to end -> panels of words: what they would be if
// they were of one sample.
void pack_keys(const AttentionPart& p, const AttentionScratch& scratch) {
  if (p.before == 0) return pack_panels(p.keys, p.end, p.width, p.bfloat16, scratch.keys);
  const std::int64_t words = words_of(p.width);
  const std::int64_t whole = p.before / kColumns * kColumns;
  pack_panels(p.prefix_keys, whole, p.width, p.bfloat16, scratch.keys);
  const std::int64_t bytes = p.width * (p.bfloat16 ? 2 : 4);
  const std::int64_t all = p.before + p.end;
  const auto count = static_cast<int>(all - whole < kColumns ? all - whole : kColumns);
  for (int i = 0; i < count; ++i) {
    const std::int64_t key = whole + i;
    const unsigned char* row = key < p.before ? row_at(p.prefix_keys, key, 0) : row_at(p.keys, key - p.before, 0);
    for (std::int64_t byte = 0; byte < bytes; ++byte) scratch.mixed[i * bytes + byte] = row[byte];
  }
  pack_panel(scratch.mixed, bytes, count, p.width, p.bfloat16, scratch.keys + whole * words);
  const std::int64_t next = whole + kColumns;
  if (next >= all) return;
  const AttentionRows rest{row_at(p.keys, next - p.before, 0), p.keys.stride, p.keys.head_stride};
  pack_panels(rest, all - next, p.width, p.bfloat16, scratch.keys + next * words);
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
  const std::int64_t padded = round_up(p.before + p.end, kColumns);
  const std::int64_t value_stride = round_up(p.value_width, kValueColumns);
  pack_keys(p, scratch);
  widen_rows(p.prefix_values, 0, 0, p.before, p.value_width, p.bfloat16, scratch.values, value_stride);
  widen_rows(p.values, 0, 0, p.end, p.value_width, p.bfloat16, scratch.values + p.before * value_stride, value_stride);

  for (int head = 0; head < p.heads; ++head) {
    for (std::int64_t first = p.begin; first < p.end; first += kRows) {
      const std::int64_t end = first + kRows < p.end ? first + kRows : p.end;  // of the queries, so of the keys as well
      const std::int64_t keys = p.before + end;
      pack_tile(p.queries, head, first, end, p.width, p.bfloat16, scratch.tile);
      for (std::int64_t key = 0; key < keys; key += kColumns)
        multiply_packed(scratch.tile, scratch.keys + key * words, words, scratch.scores + key, padded);
      const std::int64_t used = round_up(keys, kColumns);
      float totals[kRows];
      for (int r = 0; r < kRows; ++r) {
        const std::int64_t own = p.before + first + r + 1;
        const std::int64_t seen = own < used ? own : used;
        totals[r] = softmax(scratch.scores + r * padded, seen, used, p.scale);
      }
      const auto weight = [&](std::int64_t key, int r) { return Isa::broadcast(scratch.scores[r * padded + key]); };
      for (std::int64_t column = 0; column < value_stride; column += kValueColumns)
        multiply<kValueVectors>(keys, weight, scratch.values + column, value_stride, scratch.output + column,
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
