// What linear_nll.cpp drives and one file per instruction set provides.
//
// A *word* is what one 32-bit lane multiplies: a float, or a pair of bfloat16 with AVX512-BF16. Both operands are
// packed into words first, so that one source serves all: hidden into *tiles* of a few rows, the head into *panels* of
// a few columns of the logits, each laid out in the order in which the multiplication reads it.
//
// Nothing here or in what includes it may come from the standard library: the linker keeps one copy of an inline
// function, and it would be the one compiled for AVX-512, on every machine.
#pragma once

#include <cstdint>

namespace codeact {

// What a panel's logits still need. `bias` and `mask` hold one value a column of the panel.
struct Finish {
  std::int64_t first_column;  // of the panel, in the vocabulary
  const float* bias;          // or null
  float softcap;              // 0: none
  const float* mask;          // 0, or -infinity past the end of the vocabulary; null where the panel is whole
};

// Running sums of the rows of a block, for one part of the vocabulary.
//
// The sum of row r is exp(reference[r]) * (the lanes of sums, added up). The reference lags behind the largest logit:
// it moves only when that is so much larger that the sum could overflow, which after the first panel hardly happens.
struct RowSums {
  float* reference;  // (rows,)
  float* sums;       // (rows, lanes)
};

struct Kernel {
  int tile_rows;
  int panel_columns;
  int lanes;
  bool pairs;  // a word holds two elements

  // One row of (columns,) elements -> column `place` of a tile (words, tile_rows); zeros for a null row.
  void (*pack_row)(const unsigned char* row, std::int64_t columns, bool bfloat16, int place, std::uint32_t* tile);
  // (rows, columns) elements of the head, rows <= panel_columns -> (words, panel_columns); absent rows become 0.
  void (*pack_panel)(const unsigned char* data, std::int64_t row_stride, int rows, std::int64_t columns, bool bfloat16,
                     std::uint32_t* panel);
  // Multiplies a tile and a panel, and adds the exponentials of the logits to the sums of the tile's rows. A target
  // (tile_rows,) among the panel's columns gets its logit into `target_logits`.
  void (*accumulate)(const std::uint32_t* tile, const std::uint32_t* panel, std::int64_t words, const Finish& finish,
                     const std::int64_t* targets, float* target_logits, RowSums sums);
  // (rows, lanes) -> (rows,)
  void (*add_lanes)(const float* sums, std::int64_t rows, float* totals);
};

// Null where this build does not hold it. The caller makes sure that the CPU does.
const Kernel* avx2_kernel();
const Kernel* avx512_kernel();
const Kernel* avx512bf16_kernel();

}  // namespace codeact
