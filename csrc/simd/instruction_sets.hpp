// Which kernels this CPU can run.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace codeact {

struct Kernels;

enum class Element : std::uint8_t { float32, bfloat16 };

// What this CPU has and this build holds, best first: "avx512bf16", "avx512", "avx2"; none on other machines.
std::vector<std::string_view> instruction_sets();

// What this build holds, whatever the CPU.
std::vector<std::string_view> compiled_instruction_sets();

// Throws std::invalid_argument where `name` is none of them.
const Kernels& kernels_of(std::string_view name, Element element);

}  // namespace codeact
