#include "simd/avx512.inc.hpp"

namespace codeact {
namespace {
using Isa = Avx512;
}
}  // namespace codeact

#include "simd/table.inc.hpp"  // of the Isa above

namespace codeact {
const Kernels* avx512_kernels() { return &kKernels; }
}  // namespace codeact
