// Signals of bad accesses and of undefined behaviour (compiled in as a trap) become errors of the launch.
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdio>
#include <vector>

#include "state.h"

namespace emulator {

namespace {

constexpr int kSignals[4] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
struct sigaction previous[4];
stack_t previous_stack;
pthread_t owner;

uintptr_t instruction(const ucontext_t& context) {
#if defined(__x86_64__)
  return static_cast<uintptr_t>(context.uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
  return context.uc_mcontext.pc;
#else
  return 0;
#endif
}

void handle(int number, siginfo_t* info, void* context) {
  if (machine.running == nullptr || !pthread_equal(owner, pthread_self())) {
    signal(number, SIG_DFL);  // not of a kernel: happens again, and ends the process
    return;
  }
  const Fiber& fiber = *machine.running;
  const uintptr_t at = instruction(*static_cast<ucontext_t*>(context));
  Dl_info library = {};
  dladdr(reinterpret_cast<void*>(at), &library);
  const uintptr_t offset = at - reinterpret_cast<uintptr_t>(library.dli_fbase);
  char text[512];
  const bool access = number == SIGSEGV || number == SIGBUS;
  snprintf(text, sizeof text, "%s%s\n  in block (%u, %u) rank %u warp %d lane %d, at code offset 0x%zx",
           access ? "no access to " : "undefined behaviour: a misaligned address, an index, or an overflow",
           access ? describe_address(info->si_addr).c_str() : "", fiber.block->index.x, fiber.block->index.y,
           fiber.block->rank, fiber.warp->index, fiber.lane, offset);
  machine.error = text;
  leave_to_scheduler(kFailed);
}

}  // namespace

FaultGuard::FaultGuard() {
  static std::vector<char> stack(256 << 10);
  owner = pthread_self();
  stack_t own = {};
  own.ss_sp = stack.data();
  own.ss_size = stack.size();
  sigaltstack(&own, &previous_stack);
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 4; i++) sigaction(kSignals[i], &action, &previous[i]);
}

FaultGuard::~FaultGuard() {
  for (int i = 0; i < 4; i++) sigaction(kSignals[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace emulator
