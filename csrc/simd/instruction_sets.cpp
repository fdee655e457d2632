#include "simd/instruction_sets.hpp"

#include <stdexcept>
#include <string>

#include "simd/kernels.inc.hpp"

namespace codeact {
namespace {

struct InstructionSet {
  std::string_view name;
  const Kernels* (*kernels)();
};

// Those that the running CPU, and the system's saving of its registers, support.
std::vector<InstructionSet> supported() {
  std::vector<InstructionSet> sets;
#ifdef CODEACT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) sets.push_back({"avx512bf16", avx512bf16_kernels});
  if (avx512) sets.push_back({"avx512", avx512_kernels});
  if (avx2) sets.push_back({"avx2", avx2_kernels});
#endif
  return sets;
}

}  // namespace

std::vector<std::string_view> instruction_sets() {
  std::vector<std::string_view> names;
  for (const InstructionSet& set : supported()) names.push_back(set.name);
  return names;
}

std::vector<std::string_view> compiled_instruction_sets() {
#ifdef CODEACT_X86
  return {"avx512bf16", "avx512", "avx2"};
#else
  return {};
#endif
}

const Kernels& kernels_of(std::string_view name, Element element) {
  // Pairs of bfloat16 are all that AVX512-BF16 adds.
  if (name == "avx512bf16" && element == Element::float32) name = "avx512";
  for (const InstructionSet& set : supported())
    if (set.name == name) return *set.kernels();
  throw std::invalid_argument("instruction set '" + std::string(name) + "' is not on this machine");
}

}  // namespace codeact
