// The loss of every token, from hidden states and the LM head, without the logits.
//
// T rows (tokens), D elements of a row, V rows of the head (the vocabulary).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "simd/instruction_sets.hpp"

namespace codeact {

// Rows of elements that lie side by side; the rows themselves may lie any distance apart.
struct MatrixView {
  const std::byte* data;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t row_stride;  // bytes
};

struct LinearNll {
  Element element;              // of hidden and weight
  MatrixView hidden;            // (T, D)
  MatrixView weight;            // (V, D)
  const std::int64_t* targets;  // (T,), each in 0..V-1 or ignore_index
  const float* bias;            // (V,) or null
  std::optional<float> softcap;
  std::int64_t ignore_index;
  float* losses;  // (T,), out
};

// losses[t] = log(sum_v exp(z_tv)) - z_t,target with z = softcap(hidden @ weight^T + bias); 0 for an ignored row.
//
// Products of bfloat16 are exact, sums are float32 in an order that neither the other rows, nor the number of threads,
// nor their timing changes: a row has the same bits in any batch. At most `threads` threads run, the caller's included.
// Extra memory: about 8 MiB, and per thread 1 MiB or one panel of the head (a hundred rows of weight at most).
// Throws std::invalid_argument for a target out of range (named by its position) or an instruction set that is not
// here.
void linear_nll(const LinearNll& problem, int threads, std::string_view instruction_set);

}  // namespace codeact
