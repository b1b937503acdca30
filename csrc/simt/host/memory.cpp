// Which bytes a kernel may touch: named global buffers, its block's shared memory, its own stack. Kernels
// compiled with -fsanitize=thread call the __tsan_* hooks at the end for every load and store; nothing of
// libtsan is linked.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "simt/host/state.h"

namespace simt {
namespace rt {
namespace {
struct Dim {
  int64_t stride, size;  // stride in bytes
};

struct Buffer {
  std::string name;
  uptr lo, hi;
  bool writable;
  size_t run;             // bytes without a gap
  std::vector<Dim> dims;  // how runs repeat, outermost first; empty if there is no gap
  void* map;              // of guarded_alloc
  size_t map_bytes;
  std::vector<u32> owner;  // who stored to a granule in this launch: 1 + the thread's number in the grid

  bool contains(uptr p, size_t bytes) const {
    if (p < lo || p + bytes > hi) return false;
    size_t offset = p - lo;
    for (const Dim& d : dims) {
      if (int64_t(offset) / d.stride >= d.size) return false;
      offset %= size_t(d.stride);
    }
    return offset + bytes <= run || dims.empty();
  }
};

thread_local std::vector<Buffer>* buffers = nullptr;

std::vector<Buffer>& all() {
  if (!buffers) buffers = new std::vector<Buffer>;
  return *buffers;
}

constexpr size_t kPage = 4096;

// Blocks run one after another here and in no order on a GPU, so what another block stored in this launch is
// not there.
bool is_ordered(const Buffer& b, uptr p, size_t bytes, void* pc) {
  if (!b.writable || !block->config.race) return true;
  for (size_t i = (p - b.lo) / kGranule; i <= (p + bytes - 1 - b.lo) / kGranule; ++i) {
    const u64 owner = b.owner[i];
    if (!owner || (owner - 1) / u64(block->threads) == block->linear) continue;
    report(pc, nullptr, "%s reads %s+%zu, stored by block %u of the same launch", who(block->current).c_str(),
           b.name.c_str(), i * kGranule, u32((owner - 1) / u64(block->threads)));
    return false;
  }
  return true;
}
}  // namespace

bool global_ok(uptr p, size_t bytes, bool write, void* pc) {
  static __thread size_t last __attribute__((tls_model("initial-exec"))) = 0;
  std::vector<Buffer>& known = all();
  if (last < known.size() && known[last].contains(p, bytes) && (!write || known[last].writable))
    return write || is_ordered(known[last], p, bytes, pc);
  const Buffer *near = nullptr, *read_only = nullptr;
  uptr distance = 65536;
  for (size_t i = 0; i < known.size(); ++i) {
    const Buffer& b = known[i];
    if (b.contains(p, bytes)) {
      last = i;
      if (!write) return is_ordered(b, p, bytes, pc);
      if (b.writable) return true;
      read_only = &b;
    }
    const uptr d = p < b.lo ? b.lo - p : p + bytes > b.hi ? p + bytes - b.hi : 0;
    if (d < distance) {
      distance = d;
      near = &b;
    }
  }
  const std::string name = who(block->current);
  if (read_only)
    report(pc, nullptr, "%s writes read-only buffer '%s'", name.c_str(), read_only->name.c_str());
  else if (near && p >= near->lo && p + bytes <= near->hi)
    report(pc, nullptr, "%s: global %s of %zu bytes at %s+%zu is between the elements of the tensor",
           name.c_str(), write ? "write" : "read", bytes, near->name.c_str(), size_t(p - near->lo));
  else if (near)
    report(pc, nullptr, "%s: global %s of %zu bytes at %s%+lld is outside the buffer (size %zu)",
           name.c_str(), write ? "write" : "read", bytes, near->name.c_str(), (long long)(p - near->lo),
           size_t(near->hi - near->lo));
  else
    report(pc, nullptr, "%s: %s of %zu bytes at wild address %p", name.c_str(), write ? "write" : "read",
           bytes, reinterpret_cast<void*>(p));
  return false;
}

namespace {
// Blocks run one after another, so stores that collide need no clock: each granule has one storing thread.
void note_store(uptr p, size_t bytes, void* pc) {
  const u32 me = u32(block->linear * block->threads + block->current + 1);
  for (Buffer& b : all()) {
    if (!b.writable || !b.contains(p, bytes)) continue;
    for (size_t i = (p - b.lo) / kGranule; i <= (p + bytes - 1 - b.lo) / kGranule; ++i) {
      if (b.owner[i] && b.owner[i] != me)
        report(pc, nullptr, "%s stores to %s+%zu, already written by block %u thread %u",
               who(block->current).c_str(), b.name.c_str(), i * kGranule, (b.owner[i] - 1) / block->threads,
               (b.owner[i] - 1) % block->threads);
      b.owner[i] = me;
    }
    return;
  }
}
}  // namespace

bool store_ok(uptr p, size_t bytes, void* pc) {
  if (!global_ok(p, bytes, true, pc)) return false;
  if (block->config.race) note_store(p, bytes, pc);
  return true;
}

void access(void* address, size_t bytes, bool write, void* pc) {
  if (!block || block->current < 0) return;
  const uptr p = uptr(address);
  if (p - block->stack < kStackBytes) return;
  const uptr smem = uptr(block->smem);
  if (p - smem < block->smem_bytes + kPage) {
    if (p + bytes > smem + block->smem_bytes) {
      report(pc, nullptr, "%s: shared %s of %zu bytes at +%zu, block has %zu bytes",
             who(block->current).c_str(), write ? "write" : "read", bytes, size_t(p - smem),
             block->smem_bytes);
      fatal();
    }
    if (block->config.race) touch(p - smem, bytes, write, pc, block->current);
    return;
  }
  if (p - uptr(block->params) < block->param_bytes) return;
  if (p - uptr(block->stacks) < size_t(block->threads) * kStackBytes) {
    report(pc, nullptr, "%s accesses another thread's local memory", who(block->current).c_str());
    return;
  }
  Dl_info info;
  if (!write && dladdr(address, &info)) return;  // constant tables of the module
  if (!(write ? store_ok(p, bytes, pc) : global_ok(p, bytes, false, pc))) fatal();
}

void check_shared(u32 offset, size_t bytes, int align, void* pc, const char* what) {
  if (offset % align == 0 && offset + bytes <= block->smem_bytes) return;
  report(pc, nullptr, "%s: %s shared address +%u is %s", who(block->current).c_str(), what, offset,
         offset % align ? "misaligned" : "out of bounds");
  fatal();
}

void forget_owners() {
  for (Buffer& b : all())
    if (b.writable) b.owner.assign((b.hi - b.lo) / kGranule + 1, 0);
}

void load_vector(void* out, const void* p, int bytes) {
  if (uptr(p) % bytes) {
    report(SIMT_CALLER, nullptr, "%s: misaligned %d-byte load", who(block->current).c_str(), bytes);
    fatal();
  }
  access(const_cast<void*>(p), bytes, false, SIMT_CALLER);
  std::memcpy(out, p, bytes);
}

void store_vector(void* p, const void* in, int bytes) {
  if (uptr(p) % bytes) {
    report(SIMT_CALLER, nullptr, "%s: misaligned %d-byte store", who(block->current).c_str(), bytes);
    fatal();
  }
  access(p, bytes, true, SIMT_CALLER);
  std::memcpy(p, in, bytes);
}

namespace {
// Lanes never run at the same time, so a plain addition is atomic here; the checks know that the GPU's is.
template <class T>
T add(T* p, T v, void* pc) {
  const uptr offset = uptr(p) - uptr(block->smem);
  if (offset < block->smem_bytes) {
    if (block->config.race) touch(offset, sizeof v, true, pc, block->current, kAtomic);
  } else if (!global_ok(uptr(p), sizeof v, true, pc)) {
    fatal();
  }
  const T old = *p;
  *p = old + v;
  return old;
}
}  // namespace

float atomic_add(float* p, float v) { return add(p, v, SIMT_CALLER); }
int atomic_add(int* p, int v) { return add(p, v, SIMT_CALLER); }
unsigned atomic_add(unsigned* p, unsigned v) { return add(p, v, SIMT_CALLER); }
}  // namespace rt

void add_buffer(const char* name, const void* p, int item_bytes, int ndim, const int64_t* size,
                const int64_t* stride, bool writable) {
  rt::Buffer b = {name, rt::uptr(p), rt::uptr(p) + item_bytes, writable, size_t(item_bytes), {}, nullptr,
                  0,    {}};
  std::vector<rt::Dim> dims;
  for (int i = 0; i < ndim; ++i) {
    if (size[i] == 0) return;
    if (size[i] == 1 || stride[i] == 0) continue;
    dims.push_back({stride[i] * item_bytes, size[i]});
    b.hi += (size[i] - 1) * stride[i] * item_bytes;
  }
  std::sort(dims.begin(), dims.end(), [](const rt::Dim& x, const rt::Dim& y) { return x.stride < y.stride; });
  int64_t reach = item_bytes;  // bytes that the inner dims span
  for (const rt::Dim& d : dims) {
    if (d.stride < reach) {  // elements overlap: only the whole span is checked
      b.dims.clear();
      break;
    }
    reach = d.stride * d.size;
    if (b.dims.empty() && d.stride == int64_t(b.run))
      b.run *= d.size;
    else
      b.dims.insert(b.dims.begin(), d);
  }
  rt::all().push_back(std::move(b));
}

void clear_buffers() { rt::all().clear(); }

void* guarded_alloc(const char* name, size_t bytes, bool writable) {
  const size_t end = (bytes + 15) & ~size_t(15), pages = (end + rt::kPage - 1) & ~(rt::kPage - 1);
  void* map = mmap(nullptr, pages + 2 * rt::kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  unsigned char* first = static_cast<unsigned char*>(map) + rt::kPage;
  mprotect(first, pages, PROT_READ | PROT_WRITE);
  std::memset(first, 0xff, pages);
  unsigned char* p = first + pages - end;
  const int64_t size = int64_t(bytes), stride = 1;
  add_buffer(name, p, 1, 1, &size, &stride, writable);
  rt::all().back().map = map;
  rt::all().back().map_bytes = pages + 2 * rt::kPage;
  return p;
}

void guarded_free(void* p) {
  std::vector<rt::Buffer>& known = rt::all();
  for (size_t i = 0; i < known.size(); ++i)
    if (known[i].lo == rt::uptr(p) && known[i].map) {
      munmap(known[i].map, known[i].map_bytes);
      known.erase(known.begin() + long(i));
      return;
    }
}
}  // namespace simt

#define SIMT_HOOKS(bytes)                                                                        \
  void __tsan_read##bytes(void* p) { simt::rt::access(p, bytes, false, SIMT_CALLER); }           \
  void __tsan_write##bytes(void* p) { simt::rt::access(p, bytes, true, SIMT_CALLER); }           \
  void __tsan_unaligned_read##bytes(void* p) { simt::rt::access(p, bytes, false, SIMT_CALLER); } \
  void __tsan_unaligned_write##bytes(void* p) { simt::rt::access(p, bytes, true, SIMT_CALLER); }
extern "C" {
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { simt::rt::access(p, bytes, false, SIMT_CALLER); }
void __tsan_write_range(void* p, size_t bytes) { simt::rt::access(p, bytes, true, SIMT_CALLER); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
}
