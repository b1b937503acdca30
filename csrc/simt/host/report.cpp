// Reports: one for each source location, with the lines of the kernel that led there.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <mutex>

#include "simt/host/state.h"

namespace simt {
namespace rt {
namespace {
std::string find_line(void* pc) {
  Dl_info info;
  if (!pc || !dladdr(pc, &info) || !info.dli_fname) return "?";
  char command[1200], line[600];
  snprintf(command, sizeof command, "addr2line -i -e '%s' %p 2>/dev/null", info.dli_fname,
           reinterpret_cast<void*>(uptr(pc) - 1 - uptr(info.dli_fbase)));
  FILE* pipe = popen(command, "r");
  if (!pipe) return "?";
  std::string out;
  while (fgets(line, sizeof line, pipe)) {
    std::string at(line);
    at = at.substr(0, at.find_first_of(" \n"));
    if (at[0] == '?' || at.find("csrc/simt/") != std::string::npos) continue;
    out += (out.empty() ? "" : " < ") + at.substr(at.rfind('/') + 1);
  }
  pclose(pipe);
  return out.empty() ? "?" : out;
}
}  // namespace

// "a.cuh:12 < b.cuh:40": the line and the calls it was inlined from, without those of the intrinsics.
std::string where(void* pc) {
  static std::mutex mutex;
  static std::map<void*, std::string> known;  // hundreds of threads wait in one place
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(pc);
  return found != known.end() ? found->second : known[pc] = find_line(pc);
}

std::string who(int agent) {
  if (agent == block->threads) return "the async proxy";
  char name[64];
  snprintf(name, sizeof name, "thread %d (warp %d lane %d)", agent, agent / 32, agent % 32);
  return name;
}

void report(void* pc, void* other_pc, const char* format, ...) {
  Result& result = *block->result;
  if (block->reported.size() > 400 || !block->reported.insert({pc, other_pc}).second) return;
  const std::string at = where(pc) + (other_pc ? "\n    other access at " + where(other_pc) : "");
  if (result.text.find("at " + at + "\n") != std::string::npos) return;  // unrolled code has many pcs a line
  if (result.errors++ >= block->config.max_reports) return;
  char head[64], message[600];
  snprintf(head, sizeof head, "[block %u,%u,%u] ", block->id.x, block->id.y, block->id.z);
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  result.text += std::string(head) + message + "\n    at " + at + "\n";
}
}  // namespace rt
}  // namespace simt
