// The kernel for Hopper: what it can take, and how it is run.
#pragma once
#include "attention/stream_attention.h"

namespace echo {
// As stream_attention_plan and stream_attention_fwd, for bfloat16 and float16, head dims 64 and 128.
int64_t stream_attention_sm90_plan(attention::StreamAttentionParams& p, int32_t processors);
void stream_attention_sm90_fwd(attention::StreamAttentionParams& p, simt::Stream stream);
}  // namespace echo
