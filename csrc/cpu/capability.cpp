// Which implementation runs: the best one of this processor, or the one that TORCHMIX_CPU_CAPABILITY names.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "problem.h"

namespace torchmix::cpu {
namespace {

struct Choice {
  const Kernels* kernels;
  bool supported;
};

// Best first. VBMI unpacks the codes; processors with VNNI that lack it (Cascade Lake) take AVX2.
const Choice* choices(int& count) {
#if defined(__x86_64__)
  static const Choice all[] = {
      {&kAvx512Vnni, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                         __builtin_cpu_supports("bmi2")},
      {&kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")},
      {&kPortable, true},
  };
  count = 3;
#else
  static const Choice all[] = {{&kPortable, true}};
  count = 1;
#endif
  return all;
}

// The implementation of this name, the best one for no name. Throws where there is none, or where it cannot run.
const Kernels* find(const char* name) {
  int count = 0;
  const Choice* all = choices(count);
  const bool any = name == nullptr || *name == '\0';
  std::string known;
  for (int i = 0; i < count; i++) {
    known += std::string(i ? ", " : "") + all[i].kernels->name;
    if (!any && std::string(name) != all[i].kernels->name) continue;
    if (all[i].supported) return all[i].kernels;
    if (any) continue;
    throw std::runtime_error("TORCHMIX_CPU_CAPABILITY=" + std::string(name) +
                             ": this processor does not have these instructions; unset the variable");
  }
  throw std::runtime_error("TORCHMIX_CPU_CAPABILITY=" + std::string(name) +
                           " is not understood; set it to one of " + known + ", or to nothing");
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_acquire);
  if (found == nullptr) {
    found = find(std::getenv("TORCHMIX_CPU_CAPABILITY"));
    chosen.store(found, std::memory_order_release);
  }
  return *found;
}

}  // namespace torchmix::cpu

#define TORCHMIX_EXPORT extern "C" __attribute__((visibility("default")))

// Name of the implementation in use, null where the environment asks for one that cannot run.
TORCHMIX_EXPORT const char* torchmix_cpu_capability() {
  try {
    return torchmix::cpu::kernels().name;
  } catch (const std::exception&) {
    return nullptr;
  }
}

// For tests: changes the implementation of all following calls, "" for the best one. False where it cannot run.
TORCHMIX_EXPORT bool torchmix_set_cpu_capability(const char* name) {
  try {
    torchmix::cpu::chosen.store(torchmix::cpu::find(name), std::memory_order_release);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}
