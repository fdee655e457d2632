#include "simd/avx2.inc.hpp"

namespace codeact {
namespace {
using Isa = Avx2;
}
}  // namespace codeact

#include "simd/table.inc.hpp"  // of the Isa above

namespace codeact {
const Kernels* avx2_kernels() { return &kKernels; }
}  // namespace codeact
