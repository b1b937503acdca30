// Planted faults. Under g++ the emulator can plant one at run time; under nvcc they vanish.
//   SIMT_SKIP(n, statement);   the statement, left out by mutant n: around every barrier, wait and fence
//   SIMT_OFF(n, expression)    the integer, one larger in mutant n: every bound that guards a load or store,
//                              every wrap
//   SIMT_BUG(n)                whether mutant n is planted, for faults of another form
// n counts from 1 within a file; tests/test_mutants.py plants each and demands that the tests notice.
#pragma once
#if defined(SIMT_HOST)
#include <cstdint>
#include <type_traits>

namespace simt {
namespace rt {
bool planted(uint64_t mutant);
}

// One number for (name of the file without its folders, n): FNV-1a, so that shared headers keep their own
// mutants.
constexpr uint64_t mutant_id(const char* path, int n) {
  const char* name = path;
  for (const char* c = path; *c; ++c)
    if (*c == '/') name = c + 1;
  uint64_t hash = 0xcbf29ce484222325u;
  for (; *name; ++name) hash = (hash ^ uint64_t(*name)) * 0x100000001b3u;
  return (hash ^ uint64_t(n)) * 0x100000001b3u;
}

template <class T>
T one_off(T value, bool wrong) {
  static_assert(std::is_integral<T>::value, "SIMT_OFF shifts integers");
  return wrong ? T(value + 1) : value;
}
}  // namespace simt

#define SIMT_BUG(n) simt::rt::planted(std::integral_constant<uint64_t, simt::mutant_id(__FILE__, n)>::value)
#define SIMT_SKIP(n, ...)          \
  do {                             \
    if (!SIMT_BUG(n)) __VA_ARGS__; \
  } while (0)
#define SIMT_OFF(n, ...) simt::one_off((__VA_ARGS__), SIMT_BUG(n))
#else
#define SIMT_BUG(n) false
#define SIMT_SKIP(n, ...) \
  do {                    \
    __VA_ARGS__;          \
  } while (0)
#define SIMT_OFF(n, ...) (__VA_ARGS__)
#endif
