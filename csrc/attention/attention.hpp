// Causal attention in which no sample of a pack sees another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "simd/instruction_sets.hpp"

namespace codeact {

// (heads, tokens, width) elements; those of one token and head lie side by side.
struct HeadsView {
  const std::byte* data;
  std::int64_t heads;
  std::int64_t tokens;
  std::int64_t width;
  std::int64_t head_stride;   // bytes
  std::int64_t token_stride;  // bytes
};

struct AttentionOperands {
  Element element;
  HeadsView queries;
  HeadsView keys;    // its heads divide those of the queries: head h of the queries looks at h / (their quotient)
  HeadsView values;  // as many heads as keys; may have another width
  std::span<const std::int32_t> bounds;  // sample i has the tokens bounds[i]..bounds[i + 1]
  float scale;                           // of the scores
  // The sample whose tokens come before those of sample i, or -1; empty: of none. A prefix has none itself.
  std::span<const std::int32_t> prefixes = {};
};

// Products of bfloat16 are exact; scores, softmax and weighted sums are float32. A sample gets the same bits in any
// pack, on any number of threads, and with its beginning in a prefix. Throws std::invalid_argument for bounds that do
// not rise from 0 to the tokens, and for a prefix that is no sample or has one itself.
//
// output: (tokens, query heads, value width), without gaps.
void varlen_attention(const AttentionOperands& operands, std::byte* output, int threads,
                      std::string_view instruction_set);

// Gradients of the operands, each (tokens, heads, width) without gaps.
struct AttentionGradients {
  std::byte* queries;
  std::byte* keys;
  std::byte* values;
};

// The gradients of a function whose gradient with respect to the output is `output_gradient`, (query heads, tokens,
// value width). Nothing of the forward pass is needed: the softmax is made again. The same promises, without
// prefixes.
void varlen_attention_backward(const AttentionOperands& operands, const HeadsView& output_gradient,
                               const AttentionGradients& gradients, int threads, std::string_view instruction_set);

}  // namespace codeact
