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
  int32_t head_dim = 0;          // 16, 64 or 128
};

}  // namespace echo::attention

namespace echo {
// Floats of workspace that `p` needs, after planning it for a device of `processors` multiprocessors.
int64_t stream_attention_plan(attention::StreamAttentionParams& p, int32_t processors);

// Runs a planned `p`; partial_out points at the workspace.
void stream_attention_fwd(attention::StreamAttentionParams& p, simt::Stream stream);
}  // namespace echo
