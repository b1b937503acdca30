// What a test sets and reads through ctypes: it holds for every launch_kernel of this module.
#include "simt/host/runtime.h"
#include "simt/mutant.h"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

SIMT_EXPORT void simt_configure(int schedule, uint64_t seed, int race) {
  simt::Config& config = simt::rt::emulator().config;
  config.schedule = schedule;
  config.seed = seed;
  config.race = race != 0;
}

// file: the name of a source, such as "rope_rotate.cuh"; null plants nothing.
SIMT_EXPORT void simt_plant(const char* file, int mutant) {
  simt::rt::emulator().mutant = file ? simt::mutant_id(file, mutant) : 0;
}

// launches, fiber switches, collectives, bank conflicts of ldmatrix, times a planted mutant was reached.
SIMT_EXPORT void simt_counters(uint64_t (*out)[5], int reset) {
  simt::Counters& total = simt::rt::emulator().total;
  const uint64_t values[5] = {total.launches, total.switches, total.collectives, total.bank_conflicts,
                              total.mutant_hits};
  for (int i = 0; i < 5; ++i) (*out)[i] = values[i];
  if (reset) total = simt::Counters();
}
