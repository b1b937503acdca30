// Hopper's asynchronous units: nothing is on its way yet.
#include "simt/host/state_sm90.h"

namespace simt {
namespace rt {
void reset_hopper() { block->hopper = std::make_unique<Hopper>(); }
bool deliver_async() { return false; }
}  // namespace rt
}  // namespace simt
