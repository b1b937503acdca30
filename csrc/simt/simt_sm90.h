// What a kernel for sm_90a includes: mbarriers, TMA, wgmma. Its file is named *_sm90.cu.
#pragma once
#include "simt/simt.h"
#if defined(SIMT_HOST)
#include "simt/host/intrinsics_sm90.h"
#else
#include "simt/device_sm90.h"
#include "simt/wgmma.h"
#endif

namespace simt {
// Names a matrix in shared memory to wgmma, by bytes. addr: its first element, and kk * 32 further for the
// kk-th 16 columns of a K-major matrix whose rows lie in swizzled lines. kSwizzle: 128, 64, 32 or 0, as TMA
// wrote it.
//   K-major   lines of kSwizzle bytes; stride: from 8 rows to the next 8; leading: between 8 columns,
//   kSwizzle 0 only MN-major  lines of kSwizzle bytes; stride: from 8 k to the next 8; leading: between lines
//   of the same k.
//             kSwizzle 0: stride between 8 of MN, leading between 8 k
template <int kSwizzle>
SIMT_DEV uint64_t smem_desc(uint32_t addr, uint32_t leading, uint32_t stride) {
  static_assert(kSwizzle == 128 || kSwizzle == 64 || kSwizzle == 32 || kSwizzle == 0, "no such swizzle");
  constexpr uint64_t kMode = kSwizzle == 128 ? 1 : kSwizzle == 64 ? 2 : kSwizzle == 32 ? 3 : 0;
  return uint64_t((addr & 0x3ffff) >> 4) | uint64_t((leading & 0x3ffff) >> 4) << 16 |
         uint64_t((stride & 0x3ffff) >> 4) << 32 | kMode << 62;
}

// Where byte `offset` of a tile of dense kSwizzle-byte lines lies; the tile starts at a multiple of 8
// kSwizzle.
template <int kSwizzle>
SIMT_DEV constexpr uint32_t swizzled(uint32_t offset) {
  return offset ^ ((offset >> 3) & (kSwizzle == 128  ? 0x70
                                    : kSwizzle == 64 ? 0x30
                                    : kSwizzle == 32 ? 0x10
                                                     : 0));
}
}  // namespace simt
