// What nll/, attention/, clustering/ and layers/ drive and one file per instruction set provides.
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

// A row of logits as the head's product left them: without bias and softcap.
struct LogitsRow {
  unsigned char* data;
  std::int64_t columns;
  std::int64_t target;
  bool bfloat16;
  const float* bias;  // (columns,) or null
  float softcap;      // 0: none
};

// The sum of the exponentials of a row is exp(largest) * sum.
struct RowTotal {
  float largest;
  float sum;
  float target_logit;
};

// Rows of elements, one a token and head: token t of head h is `t * stride + h * head_stride` bytes from the first.
template <class Byte>
struct BasicAttentionRows {
  Byte* data;
  std::int64_t stride;
  std::int64_t head_stride;
};
using AttentionRows = BasicAttentionRows<const unsigned char>;
using WritableAttentionRows = BasicAttentionRows<unsigned char>;

// Queries begin..end of one sample, of all heads that share one head of keys and values. Tokens count from the first
// of the sample. A query sees the keys up to its own, and before them all `before` keys of its prefix.
struct AttentionPart {
  AttentionRows queries;
  AttentionRows keys;
  AttentionRows values;
  AttentionRows prefix_keys;
  AttentionRows prefix_values;
  std::int64_t before;
  std::int64_t begin;
  std::int64_t end;
  std::int64_t width;        // elements of a query and of a key
  std::int64_t value_width;  // elements of a value
  int heads;
  bool bfloat16;
  float scale;
};

// Room for the keys and values up to `before + end`: with K and V that are those and the value's width, rounded up to
// whole panels and value columns.
struct AttentionScratch {
  unsigned char* mixed;  // (panel_columns, width) elements: keys of a panel in which the prefix ends
  std::uint32_t* keys;   // (K / panel_columns, words, panel_columns)
  float* values;         // (K, V)
  std::uint32_t* tile;   // (words, tile_rows)
  float* scores;         // (tile_rows, K)
  float* output;         // (tile_rows, V)
};

// Gradients of a part. Those of the keys and values are of its own queries only: (R, D) and (R, V) float32, with R
// that is `end` rounded up to whole tiles, D and V the widths rounded up to value columns.
struct AttentionPartGradients {
  AttentionRows output;
  WritableAttentionRows queries;
  float* keys;
  float* values;
};

// Room as above; D is the width of queries and keys, rounded up to value columns, Q is gradient_queries.
struct AttentionGradientScratch {
  std::uint32_t* keys;    // (K / panel_columns, words, panel_columns)
  std::uint32_t* values;  // (K / panel_columns, words of a value, panel_columns)
  float* key_rows;        // (K, D)
  std::uint32_t* tile;    // (words of a query or a value, tile_rows)
  float* query_rows;      // (Q, D)
  float* output_rows;     // (Q, V)
  float* weights;         // (Q, K + lanes)
  float* slopes;          // (Q, K + lanes)
  float* product;         // (tile_rows, D)
};

struct Kernels {
  int tile_rows;
  int panel_columns;
  int value_columns;  // of the values that are multiplied at once
  int lanes;
  bool pairs;            // a word holds two elements
  int gradient_queries;  // whose weights are held at once in attend_backward

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
  RowTotal (*total_row)(const LogitsRow& row);
  // Writes scale * d loss / d logit over the logits.
  void (*slope_row)(const LogitsRow& row, const RowTotal& total, float scale);
  // Rounds to nearest, ties to even; a NaN stays one.
  void (*store_row)(const float* values, std::int64_t count, bool bfloat16, unsigned char* target);
  // (tile_rows,) rows of (features,) floats times packed columns -> products, `stride` apart from row to row, which
  // have room for whole panels; what is past `columns` has no meaning.
  void (*multiply_rows)(const float* const* rows, std::int64_t features, const std::uint32_t* panels,
                        std::int64_t columns, float* products, std::int64_t stride);
  // (columns,) elements each; `target` may be what is read.
  void (*normalize_row)(const unsigned char* row, const unsigned char* weight, std::int64_t columns, bool bfloat16,
                        float epsilon, unsigned char* target);
  void (*gate_row)(const unsigned char* gate, const unsigned char* up, std::int64_t columns, bool bfloat16,
                   unsigned char* target);
  void (*rotate_row)(const unsigned char* row, const unsigned char* cosine, const unsigned char* sine,
                     std::int64_t columns, bool bfloat16, unsigned char* target);
  void (*attend)(const AttentionPart& part, const WritableAttentionRows& output, const AttentionScratch& scratch);
  void (*attend_backward)(const AttentionPart& part, const AttentionPartGradients& gradients,
                          const AttentionGradientScratch& scratch);
};

const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();

}  // namespace codeact
