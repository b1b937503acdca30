// Hopper's asynchronous units in the block that runs. Internal to csrc/simt/host.
#pragma once
#include "simt/host/state.h"

namespace simt {
namespace rt {
struct Hopper {};
}  // namespace rt
}  // namespace simt
