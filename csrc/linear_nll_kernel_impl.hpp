// The kernel of linear_nll.cpp, for the instruction set `Isa` of the file that includes this one.
//
// Isa gives a vector `Vec` of `kLanes` floats, and functions of the names below. The multiplication itself is
// Isa::multiply_add(a, b, sum): sum + a * b for float words, and for pairs sum + a0 * b0 + a1 * b1.
#pragma once

#include <immintrin.h>

#include "linear_nll_kernel.hpp"

namespace codeact {
namespace {

constexpr int kRows = Isa::kTileRows;
constexpr int kVectors = Isa::kPanelVectors;
constexpr int kLanes = Isa::kLanes;
constexpr int kColumns = kVectors * kLanes;

constexpr float kLog2e = 1.44269504088896341F;
constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.402823466e+38F;
// A sum of 2^17 terms of 2^64 is still far from overflow; what is 2^126 below the reference is nothing beside it.
constexpr float kLag = 64.0F;

// 2^x for x in -126..127, to 2e-7 of itself; 0 or nearly 0 below; NaN for NaN.
inline Isa::Vec exp2(Isa::Vec x) {
  x = Isa::max(Isa::broadcast(-127.0F), x);  // in this order a NaN stays
  const Isa::Vec whole = Isa::round(x);
  const Isa::Vec f = Isa::subtract(x, whole);  // -0.5..0.5
  // The polynomial of degree 5 with the least relative error, 9e-8, that is exact at 0.
  Isa::Vec p = Isa::broadcast(1.326472541e-3F);
  p = Isa::fused(p, f, Isa::broadcast(9.671512768e-3F));
  p = Isa::fused(p, f, Isa::broadcast(5.550733749e-2F));
  p = Isa::fused(p, f, Isa::broadcast(2.402224208e-1F));
  p = Isa::fused(p, f, Isa::broadcast(6.931469776e-1F));
  p = Isa::fused(p, f, Isa::broadcast(1.0F));
  return Isa::scale(p, whole);
}

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
  Isa::Vec z[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) z[r][v] = Isa::broadcast(0.0F);
  for (std::int64_t word = 0; word < words; ++word) {
    Isa::Vec b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = Isa::load_words(panel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Isa::Vec a = Isa::broadcast_word(tile + r);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) z[r][v] = Isa::multiply_add(a, b[v], z[r][v]);
    }
    tile += kRows;
    panel += kColumns;
  }
  // Through memory, so that the exponentials' constants do not push the sums above out of the registers.
  alignas(64) float logits[kRows][kColumns];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) Isa::store(&logits[r][v * kLanes], z[r][v]);
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

inline std::int64_t words_of(std::int64_t columns) { return Isa::kPairs ? (columns + 1) / 2 : columns; }

// The words from `word` on of one row, as many as a vector has; elements past the row's end are 0.
inline Isa::Vec row_words(const unsigned char* row, std::int64_t word, std::int64_t columns, bool bfloat16) {
  const std::int64_t element = Isa::kPairs ? 2 * word : word;
  const int needed = Isa::kPairs ? 2 * kLanes : kLanes;
  const int bytes = bfloat16 ? 2 : 4;
  const unsigned char* source = row + element * bytes;
  alignas(64) unsigned char rest[4 * kLanes];
  if (element + needed > columns) {
    __builtin_memset(rest, 0, sizeof rest);
    if (element < columns) __builtin_memcpy(rest, source, static_cast<unsigned long>((columns - element) * bytes));
    source = rest;
  }
  return bfloat16 && !Isa::kPairs ? Isa::widen_bfloat16(source) : Isa::load_words(source);
}

void pack_row(const unsigned char* row, std::int64_t columns, bool bfloat16, int place, std::uint32_t* tile) {
  const std::int64_t words = words_of(columns);
  for (std::int64_t word = 0; word < words; word += kLanes) {
    alignas(64) std::uint32_t values[kLanes] = {};
    if (row) Isa::store_words(values, row_words(row, word, columns, bfloat16));
    const std::int64_t count = words - word < kLanes ? words - word : kLanes;
    for (std::int64_t i = 0; i < count; ++i) tile[(word + i) * kRows + place] = values[i];
  }
}

void pack_panel(const unsigned char* data, std::int64_t row_stride, int rows, std::int64_t columns, bool bfloat16,
                std::uint32_t* panel) {
  const std::int64_t words = words_of(columns);
  for (int first = 0; first < kColumns; first += kLanes) {
    for (std::int64_t word = 0; word < words; word += kLanes) {
      Isa::Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int r = first + i;
        block[i] = r < rows ? row_words(data + r * row_stride, word, columns, bfloat16) : Isa::broadcast(0.0F);
      }
      Isa::transpose(block);
      const std::int64_t count = words - word < kLanes ? words - word : kLanes;
      for (std::int64_t i = 0; i < count; ++i) Isa::store_words(panel + (word + i) * kColumns + first, block[i]);
    }
  }
}

void add_lanes(const float* sums, std::int64_t rows, float* totals) {
  for (std::int64_t row = 0; row < rows; ++row) {
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += sums[row * kLanes + lane];
    totals[row] = total;
  }
}

constexpr Kernel kKernel = {.tile_rows = kRows,
                            .panel_columns = kColumns,
                            .lanes = kLanes,
                            .pairs = Isa::kPairs,
                            .pack_row = pack_row,
                            .pack_panel = pack_panel,
                            .accumulate = accumulate,
                            .add_lanes = add_lanes};

}  // namespace
}  // namespace codeact
