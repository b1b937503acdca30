// What this machine can run. Each call asks the driver, so none may happen at import.
#pragma once
#include <string>
#include <vector>

namespace echo {
// Why the kernels of this build can't run on the current device; empty if they can.
std::string driver_error();

// One line a device: "NVIDIA H200, sm_90, 139 GiB". Throws where the driver can't be asked.
std::vector<std::string> device_info();
}  // namespace echo
