// Memory that a thread keeps from task to task.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace echo {
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      memory_ = static_cast<char*>(std::aligned_alloc(64, size_t(bytes)));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  int64_t size_ = 0;
};
}  // namespace echo
