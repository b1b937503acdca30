// Which of the instruction sets that CPU kernels are built for can run here.
#pragma once
#include <string>

namespace echo {
enum class Isa : int { kNone = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };  // each includes those before it

// The best that this build and this CPU have.
Isa best_isa();

// Whether bfloat16 products of matrices have a unit of their own, which no kernel here uses.
bool has_amx_bf16();

// The set called `name`, or the best for "". Throws where it is unknown or can't run here.
Isa isa_named(const std::string& name);

const char* name_of(Isa isa);  // "none", "avx2", "avx512" or "avx512_bf16"
}  // namespace echo
