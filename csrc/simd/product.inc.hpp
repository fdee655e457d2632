// The matrix product of a tile and a panel, and how both are packed, for the instruction set `Isa` of the file that
// includes this one.
//
// Isa gives a vector `Vec` of `kLanes` floats, and functions of the names below. The multiplication itself is
// Isa::multiply_add(a, b, sum): sum + a * b for float words, and for pairs sum + a0 * b0 + a1 * b1.
#pragma once

#include <immintrin.h>

#include "simd/kernels.inc.hpp"

namespace codeact {
namespace {

constexpr int kRows = Isa::kTileRows;
constexpr int kVectors = Isa::kPanelVectors;
constexpr int kLanes = Isa::kLanes;
constexpr int kColumns = kVectors * kLanes;

constexpr float kLog2e = 1.44269504088896341F;
constexpr float kInfinity = __builtin_inff();

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

inline std::int64_t words_of(std::int64_t columns) { return Isa::kPairs ? (columns + 1) / 2 : columns; }

// The elements [first, first + needed) of a row of `columns`, or a copy with 0 for those past its end.
struct Elements {
  alignas(64) unsigned char copy[4 * kLanes];
  const unsigned char* data;

  Elements(const unsigned char* row, std::int64_t first, int needed, std::int64_t columns, int bytes)
      : data(row + first * bytes) {
    if (first + needed <= columns) return;
    __builtin_memset(copy, 0, sizeof copy);
    if (first < columns) __builtin_memcpy(copy, data, static_cast<unsigned long>((columns - first) * bytes));
    data = copy;
  }
};

// As many words of a row as a vector has, from `word` on.
inline Isa::Vec row_words(const unsigned char* row, std::int64_t word, std::int64_t columns, bool bfloat16) {
  const int each = Isa::kPairs ? 2 : 1;
  const Elements elements(row, word * each, kLanes * each, columns, bfloat16 ? 2 : 4);
  return bfloat16 && !Isa::kPairs ? Isa::widen_bfloat16(elements.data) : Isa::load_words(elements.data);
}

// The same as floats.
inline Isa::Vec row_floats(const unsigned char* row, std::int64_t first, std::int64_t columns, bool bfloat16) {
  const Elements elements(row, first, kLanes, columns, bfloat16 ? 2 : 4);
  return bfloat16 ? Isa::widen_bfloat16(elements.data) : Isa::load_words(elements.data);
}

void store_elements(const float* values, std::int64_t count, bool bfloat16, unsigned char* target) {
  if (!bfloat16) {
    __builtin_memcpy(target, values, static_cast<unsigned long>(count) * sizeof(float));
    return;
  }
  auto* halves = reinterpret_cast<std::uint16_t*>(target);
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, values + i, sizeof bits);
    // To nearest, ties to even; a NaN stays one.
    const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    halves[i] = static_cast<std::uint16_t>((bits & 0x7fffffffU) > 0x7f800000U ? 0x7fc0U : rounded);
  }
}

// As many elements as a vector has, from `at` on; the last ones of a row are stored one by one.
inline void store_row_floats(Isa::Vec x, unsigned char* row, std::int64_t at, std::int64_t columns, bool bfloat16) {
  if (at + kLanes <= columns && bfloat16) return Isa::store_bfloat16(row + at * 2, x);
  if (at + kLanes <= columns) return Isa::store(reinterpret_cast<float*>(row) + at, x);
  alignas(64) float values[kLanes];
  Isa::store(values, x);
  store_elements(values, columns - at, bfloat16, row + at * (bfloat16 ? 2 : 4));
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

// Rows kRows of `a`, times Vectors vectors of columns of `b`, `b_stride` apart from word to word, over `words` words.
// a(word, row) is the word's value in all lanes. The result goes to memory, (kRows, Vectors * kLanes), so that the
// constants of what comes next do not push the sums out of the registers; with kAdd it is added to what is there.
template <int Vectors, bool kAdd = false, class Multiply, class Row>
inline void multiply(std::int64_t words, const Row& a, const float* b, std::int64_t b_stride, float* product,
                     std::int64_t product_stride, const Multiply& multiply_add) {
  Isa::Vec sums[kRows][Vectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < Vectors; ++v)
      sums[r][v] = kAdd ? Isa::load(product + r * product_stride + v * kLanes) : Isa::broadcast(0.0F);
  for (std::int64_t word = 0; word < words; ++word) {
    Isa::Vec columns[Vectors];
    for (int v = 0; v < Vectors; ++v) columns[v] = Isa::load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Isa::Vec row = a(word, r);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[r][v] = multiply_add(row, columns[v], sums[r][v]);
    }
    b += b_stride;
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < Vectors; ++v) Isa::store(product + r * product_stride + v * kLanes, sums[r][v]);
}

// A packed tile times a packed panel.
inline void multiply_packed(const std::uint32_t* tile, const std::uint32_t* panel, std::int64_t words, float* product,
                            std::int64_t product_stride) {
  const auto row = [tile](std::int64_t word, int r) { return Isa::broadcast_word(tile + word * kRows + r); };
  multiply<kVectors>(words, row, reinterpret_cast<const float*>(panel), kColumns, product, product_stride,
                     Isa::multiply_add);
}

}  // namespace
}  // namespace codeact
