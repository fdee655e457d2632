#include "simd/avx512.inc.hpp"

namespace codeact {
namespace {
// A product of two bfloat16 is exact in float32; each of the two sums of an instruction is rounded.
struct Isa : Avx512 {
  static constexpr bool kPairs = true;
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
}  // namespace
}  // namespace codeact

#include "simd/table.inc.hpp"  // of the Isa above

namespace codeact {
const Kernels* avx512bf16_kernels() { return &kKernels; }
}  // namespace codeact
