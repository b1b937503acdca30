// Divides the tokens of a tensor into tasks, for kernels that do a run of tokens at a time.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/parallel.h"

namespace echo {
inline constexpr int64_t kTaskElements = 1 << 15;  // a task this small costs no more than handing it out

// Calls kernel(params, begin, end) for runs that cover `tokens` tokens of `width` elements, on up to
// `threads` threads.
template <class Params>
void run_token_tasks(void (*kernel)(const Params&, int64_t begin, int64_t end), const Params& params,
                     int64_t tokens, int64_t width, int threads) {
  if (tokens == 0 || width == 0) return;
  struct Plan {
    void (*kernel)(const Params&, int64_t, int64_t);
    const Params& params;
    int64_t tokens, each;
  } plan{kernel, params, tokens, std::max<int64_t>(1, kTaskElements / width)};
  const auto run = [](void* context, int64_t number) {
    const Plan& p = *static_cast<Plan*>(context);
    const int64_t begin = number * p.each;
    p.kernel(p.params, begin, std::min(begin + p.each, p.tokens));
  };
  run_tasks((tokens + plan.each - 1) / plan.each, threads, run, &plan);
}
}  // namespace echo
