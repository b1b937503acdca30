// Attention over sink, memory and ring, read in place, the query turned between two frames of reference.
#pragma once
#include "attention/attention_params.h"
#include "common/tensor_view.h"
#include "simt/stream.h"

namespace echo::attention {

struct StreamAttentionParams : AttentionParams {
  const float* shift = nullptr;  // (B or 1, n_t, 2) cos and sin; null where the frames of reference agree
  int64_t shift_stride = 0;      // of the batch; 0 where all share one row
  DType dtype = DType::kBF16;
  int32_t head_dim = 0;  // 16, 64 or 128
};

}  // namespace echo::attention

namespace echo {
// Plans tiles and steps of `p` for a device of `processors` multiprocessors.
void stream_attention_plan(attention::StreamAttentionParams& p, int32_t processors);
// Runs a planned `p` that has its workspace.
void stream_attention_fwd(const attention::StreamAttentionParams& p, simt::Stream stream);

// Its last part, where blocks shared tiles.
void stream_attention_join(const attention::StreamAttentionParams& p, simt::Stream stream);

// The same on Hopper, for bfloat16 and float16 and head dims 64 and 128.
void stream_attention_sm90_plan(attention::StreamAttentionParams& p, int32_t processors);
void stream_attention_sm90_fwd(const attention::StreamAttentionParams& p, simt::Stream stream);
}  // namespace echo
