// wgmma under nvcc: d (64xN, float) (+)= a (64x16) b (16xN) by a warpgroup, asynchronously.
#pragma once
#include "simt/device.h"

namespace simt {
// Before the wgmmas of a group: shows registers the threads wrote to the tensor cores.
SIMT_DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SIMT_DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most N groups are on their way; only then are their accumulators the threads' again.
template <int N>
SIMT_DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving registers across this place: around a group, as it knows nothing of
// asynchrony.
template <int N>
SIMT_DEV void wgmma_pin(float (&d)[N]) {
  SIMT_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operand lists: numbers in the text, and the registers they stand for.
#define SIMT_N8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define SIMT_N16 SIMT_N8(0, 1, 2, 3, 4, 5, 6, 7) "," SIMT_N8(8, 9, 10, 11, 12, 13, 14, 15)
#define SIMT_N32 \
  SIMT_N16 "," SIMT_N8(16, 17, 18, 19, 20, 21, 22, 23) "," SIMT_N8(24, 25, 26, 27, 28, 29, 30, 31)
#define SIMT_N48 \
  SIMT_N32 "," SIMT_N8(32, 33, 34, 35, 36, 37, 38, 39) "," SIMT_N8(40, 41, 42, 43, 44, 45, 46, 47)
#define SIMT_N64 \
  SIMT_N48 "," SIMT_N8(48, 49, 50, 51, 52, 53, 54, 55) "," SIMT_N8(56, 57, 58, 59, 60, 61, 62, 63)
#define SIMT_N80 \
  SIMT_N64 "," SIMT_N8(64, 65, 66, 67, 68, 69, 70, 71) "," SIMT_N8(72, 73, 74, 75, 76, 77, 78, 79)
#define SIMT_N88 SIMT_N80 "," SIMT_N8(80, 81, 82, 83, 84, 85, 86, 87)
#define SIMT_N96 \
  SIMT_N80 "," SIMT_N8(80, 81, 82, 83, 84, 85, 86, 87) "," SIMT_N8(88, 89, 90, 91, 92, 93, 94, 95)
#define SIMT_N112 \
  SIMT_N96 "," SIMT_N8(96, 97, 98, 99, 100, 101, 102, 103) "," SIMT_N8(104, 105, 106, 107, 108, 109, 110, 111)
#define SIMT_N128                                                                                         \
  SIMT_N112 "," SIMT_N8(112, 113, 114, 115, 116, 117, 118, 119) "," SIMT_N8(120, 121, 122, 123, 124, 125, \
                                                                            126, 127)
#define SIMT_D8(i)                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define SIMT_D16 SIMT_D8(0), SIMT_D8(8)
#define SIMT_D32 SIMT_D16, SIMT_D8(16), SIMT_D8(24)
#define SIMT_D48 SIMT_D32, SIMT_D8(32), SIMT_D8(40)
#define SIMT_D64 SIMT_D48, SIMT_D8(48), SIMT_D8(56)
#define SIMT_D80 SIMT_D64, SIMT_D8(64), SIMT_D8(72)
#define SIMT_D88 SIMT_D80, SIMT_D8(80)
#define SIMT_D96 SIMT_D80, SIMT_D8(80), SIMT_D8(88)
#define SIMT_D112 SIMT_D96, SIMT_D8(96), SIMT_D8(104)
#define SIMT_D128 SIMT_D112, SIMT_D8(112), SIMT_D8(120)
#define SIMT_N8_ SIMT_N8(0, 1, 2, 3, 4, 5, 6, 7)
#define SIMT_D8_ SIMT_D8(0)

template <class T, int N>
struct Wgmma;

// regs is N / 2, the number of the first operand behind the accumulators; o1.. are the numbers after it.
#define SIMT_WGMMA(type, name, n, numbers, regs, o1, o2, o3, o4, o5, o6, list)                               \
  template <>                                                                                                \
  struct Wgmma<type, n> {                                                                                    \
    template <int kTransA, int kTransB>                                                                      \
    SIMT_DEV static void ss(float (&d)[n / 2], uint64_t a, uint64_t b, int accumulate) {                     \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p,%" #o2 ",0;\nwgmma.mma_async.sync.aligned.m64n" #n       \
                   "k16.f32." name "." name " {" numbers "},%" #regs ",%" #o1 ",p,1,1,%" #o3 ",%" #o4 ";\n}" \
                   : list                                                                                    \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB));                           \
    }                                                                                                        \
    template <int kTransB>                                                                                   \
    SIMT_DEV static void rs(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p,%" #o5 ",0;\nwgmma.mma_async.sync.aligned.m64n" #n       \
                   "k16.f32." name "." name " {" numbers "},{%" #regs ",%" #o1 ",%" #o2 ",%" #o3 "},%" #o4   \
                   ",p,1,1,%" #o6 ";\n}"                                                                     \
                   : list                                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransB));     \
    }                                                                                                        \
  };
#define SIMT_WGMMAS(type, name)                                                        \
  SIMT_WGMMA(type, name, 16, SIMT_N8_, 8, 9, 10, 11, 12, 13, 14, SIMT_D8_)             \
  SIMT_WGMMA(type, name, 32, SIMT_N16, 16, 17, 18, 19, 20, 21, 22, SIMT_D16)           \
  SIMT_WGMMA(type, name, 64, SIMT_N32, 32, 33, 34, 35, 36, 37, 38, SIMT_D32)           \
  SIMT_WGMMA(type, name, 96, SIMT_N48, 48, 49, 50, 51, 52, 53, 54, SIMT_D48)           \
  SIMT_WGMMA(type, name, 128, SIMT_N64, 64, 65, 66, 67, 68, 69, 70, SIMT_D64)          \
  SIMT_WGMMA(type, name, 160, SIMT_N80, 80, 81, 82, 83, 84, 85, 86, SIMT_D80)          \
  SIMT_WGMMA(type, name, 176, SIMT_N88, 88, 89, 90, 91, 92, 93, 94, SIMT_D88)          \
  SIMT_WGMMA(type, name, 192, SIMT_N96, 96, 97, 98, 99, 100, 101, 102, SIMT_D96)       \
  SIMT_WGMMA(type, name, 224, SIMT_N112, 112, 113, 114, 115, 116, 117, 118, SIMT_D112) \
  SIMT_WGMMA(type, name, 256, SIMT_N128, 128, 129, 130, 131, 132, 133, 134, SIMT_D128)
SIMT_WGMMAS(bf16, "bf16")
SIMT_WGMMAS(f16, "f16")
#undef SIMT_WGMMAS
#undef SIMT_WGMMA

// a and b by descriptor; kTrans: MN-major. accumulate 0: d = a b.
template <class T, int N, int kTransA, int kTransB>
SIMT_DEV void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  Wgmma<T, N>::template ss<kTransA, kTransB>(d, a, b, accumulate);
}

// a in registers, laid out as the a of mma_*_16816 for rows 16 w.. of warp w.
template <class T, int N, int kTransB>
SIMT_DEV void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  Wgmma<T, N>::template rs<kTransB>(d, a, b, accumulate);
}
}  // namespace simt
