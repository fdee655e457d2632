#include "isa_avx2.hpp"

namespace codeact {
namespace {
using Isa = Avx2;
}
}  // namespace codeact

#include "kernels_impl.hpp"  // of the Isa above

namespace codeact {
const Kernels* avx2_kernels() { return &kKernels; }
}  // namespace codeact
