// Gradients of causal attention of some queries of one sample, for the instruction set `Isa`. With weights P, values V
// and the gradient G of the output, per query i and key j:
//
//   slope_ij = scale P_ij (G_i . V_j - sum_k P_ik G_i . V_k)    the gradient of the product Q_i . K_j
//   dV_j = sum_i P_ij G_i    dQ_i = sum_j slope_ij K_j    dK_j = sum_i slope_ij Q_i
//
// P is made again as the forward pass makes it. All keys of a query are there at once, so the inner sum is made of what
// it belongs to, and not of a rounded output. All of it is float32; products of bfloat16 are exact.
#pragma once

#include "attention/forward_kernel.inc.hpp"

namespace codeact {
namespace {

// Whole tiles of every instruction set. With more, weights and slopes leave the cache; with fewer, the gradients of
// keys and values are read and written more often.
constexpr int kGradientQueries = 48;
static_assert(kGradientQueries % kRows == 0);

// One query: scores -> weights, products with the values -> slopes. What is not seen becomes 0 up to `padded`.
void weigh(float* weights, float* slopes, std::int64_t seen, std::int64_t used, std::int64_t padded, float scale) {
  const float total = softmax(weights, seen, used, scale);
  for (std::int64_t key = seen; key < padded; ++key) weights[key] = slopes[key] = 0;
  Isa::Vec sum = Isa::broadcast(0.0F);
  for (std::int64_t key = 0; key < used; key += kLanes)
    sum = Isa::fused(Isa::load(weights + key), Isa::load(slopes + key), sum);
  alignas(64) float lanes[kLanes];
  Isa::store(lanes, sum);
  float mean = 0;
  for (int lane = 0; lane < kLanes; ++lane) mean += lanes[lane];
  const Isa::Vec subtrahend = Isa::broadcast(mean / total);
  const Isa::Vec share = Isa::broadcast(1.0F / total);
  const Isa::Vec factor = Isa::broadcast(scale);
  for (std::int64_t key = 0; key < used; key += kLanes) {
    const Isa::Vec weight = Isa::multiply(Isa::load(weights + key), share);
    const Isa::Vec slope = Isa::multiply(weight, Isa::subtract(Isa::load(slopes + key), subtrahend));
    Isa::store(weights + key, weight);
    Isa::store(slopes + key, Isa::multiply(slope, factor));
  }
}

// Adds to `sums` (keys, stride) what a block of queries gives: factors (queries, keys) transposed times rows (queries,
// stride). The first query sees the keys up to `begin`, the next one more, and so on.
void add_transposed(const float* factors, std::int64_t factor_stride, const float* rows, std::int64_t stride,
                    std::int64_t begin, std::int64_t end, float* sums) {
  for (std::int64_t key = 0; key < end; key += kRows) {
    const std::int64_t skipped = key > begin ? key - begin : 0;
    const float* from = factors + skipped * factor_stride + key;
    const auto factor = [&](std::int64_t query, int r) { return Isa::broadcast(from[query * factor_stride + r]); };
    for (std::int64_t column = 0; column < stride; column += kValueColumns)
      multiply<kValueVectors, true>(end - begin - skipped, factor, rows + skipped * stride + column, stride,
                                    sums + key * stride + column, stride, Isa::fused);
  }
}

void attend_backward(const AttentionPart& p, const AttentionPartGradients& gradients,
                     const AttentionGradientScratch& scratch) {
  const std::int64_t words = words_of(p.width);
  const std::int64_t value_words = words_of(p.value_width);
  const std::int64_t stride = round_up(p.width, kValueColumns);
  const std::int64_t value_stride = round_up(p.value_width, kValueColumns);
  const std::int64_t row = round_up(p.end, kColumns) + kLanes;  // of weights: the last tile of keys may stand out
  pack_panels(p.keys, p.end, p.width, p.bfloat16, scratch.keys);
  pack_panels(p.values, p.end, p.value_width, p.bfloat16, scratch.values);
  widen_rows(p.keys, 0, 0, p.end, p.width, p.bfloat16, scratch.key_rows, stride);
  const auto key_rows = static_cast<unsigned long>(round_up(p.end, kRows));
  __builtin_memset(gradients.keys, 0, key_rows * static_cast<unsigned long>(stride) * sizeof(float));
  __builtin_memset(gradients.values, 0, key_rows * static_cast<unsigned long>(value_stride) * sizeof(float));

  for (int head = 0; head < p.heads; ++head) {
    for (std::int64_t begin = p.begin; begin < p.end; begin += kGradientQueries) {
      const std::int64_t end = begin + kGradientQueries < p.end ? begin + kGradientQueries : p.end;
      const std::int64_t padded = round_up(end, kColumns) + kLanes;
      widen_rows(p.queries, head, begin, end, p.width, p.bfloat16, scratch.query_rows, stride);
      widen_rows(gradients.output, head, begin, end, p.value_width, p.bfloat16, scratch.output_rows, value_stride);
      for (std::int64_t first = begin; first < end; first += kRows) {
        const std::int64_t last = first + kRows < end ? first + kRows : end;  // of the queries, so of the keys as well
        const std::int64_t used = round_up(last, kColumns);
        float* weights = scratch.weights + (first - begin) * row;
        float* slopes = scratch.slopes + (first - begin) * row;
        pack_tile(p.queries, head, first, last, p.width, p.bfloat16, scratch.tile);
        for (std::int64_t key = 0; key < last; key += kColumns)
          multiply_packed(scratch.tile, scratch.keys + key * words, words, weights + key, row);
        pack_tile(gradients.output, head, first, last, p.value_width, p.bfloat16, scratch.tile);
        for (std::int64_t key = 0; key < last; key += kColumns)
          multiply_packed(scratch.tile, scratch.values + key * value_words, value_words, slopes + key, row);
        for (int r = 0; r < kRows; ++r) {
          const std::int64_t seen = first + r + 1 < used ? first + r + 1 : used;
          weigh(weights + r * row, slopes + r * row, seen, used, padded, p.scale);
        }
        const auto slope = [&](std::int64_t key, int r) { return Isa::broadcast(slopes[r * row + key]); };
        for (std::int64_t column = 0; column < stride; column += kValueColumns)
          multiply<kValueVectors>(last, slope, scratch.key_rows + column, stride, scratch.product + column, stride,
                                  Isa::fused);
        for (int r = 0; first + r < last; ++r)
          store_elements(scratch.product + r * stride, p.width, p.bfloat16, row_at(gradients.queries, first + r, head));
      }
      add_transposed(scratch.weights, row, scratch.output_rows, value_stride, begin, end, gradients.values);
      add_transposed(scratch.slopes, row, scratch.query_rows, stride, begin, end, gradients.keys);
    }
  }
}

}  // namespace
}  // namespace codeact
