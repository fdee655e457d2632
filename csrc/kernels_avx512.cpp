#include "isa_avx512.hpp"

namespace codeact {
namespace {
using Isa = Avx512;
}
}  // namespace codeact

#include "kernels_impl.hpp"  // of the Isa above

namespace codeact {
const Kernels* avx512_kernels() { return &kKernels; }
}  // namespace codeact
