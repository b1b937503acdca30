#include "common/cpu/isa.h"

#include "common/check.h"

namespace echo {
Isa best_isa() {
#ifdef ECHO_EXT_X86_KERNELS
  static const Isa best = [] {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kNone;
    for (const bool has :
         {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bw") != 0,
          __builtin_cpu_supports("avx512dq") != 0, __builtin_cpu_supports("avx512vl") != 0}) {
      if (!has) return Isa::kAvx2;
    }
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }();
  return best;
#else
  return Isa::kNone;
#endif
}

bool has_amx_bf16() {
#ifdef ECHO_EXT_X86_KERNELS
  return __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

Isa isa_named(const std::string& name) {
  if (name.empty()) return best_isa();
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (name != name_of(isa)) continue;
    ECHO_CHECK(isa <= best_isa(), "this CPU or build has no ", name, ", only ", name_of(best_isa()));
    return isa;
  }
  ECHO_CHECK(false, "isa must be avx2, avx512 or avx512_bf16, got ", name);
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kNone:
      return "none";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
  }
  ECHO_CHECK(false, "no instruction set has the number ", int(isa));
}
}  // namespace echo
