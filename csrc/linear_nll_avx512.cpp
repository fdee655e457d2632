#include "linear_nll_avx512_isa.hpp"

namespace codeact {
namespace {
using Isa = Avx512;
}
}  // namespace codeact

#include "linear_nll_kernel_impl.hpp"

namespace codeact {
const Kernel* avx512_kernel() { return &kKernel; }
}  // namespace codeact
