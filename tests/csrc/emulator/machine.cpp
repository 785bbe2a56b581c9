// Fibers, and the order in which they run.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "state.h"

emulator::Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Machine machine;

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kSwitched = 1;

// Stacks are kept for the next launch; the page below each cannot be touched.
uint8_t* stack_number(size_t i) {
  static std::vector<uint8_t*> stacks;
  while (stacks.size() <= i) {
    void* memory = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(memory, kPage, PROT_NONE);
    stacks.push_back(static_cast<uint8_t*>(memory) + kPage);
  }
  return stacks[i];
}

void fiber_main() {
  (*machine.kernel)();
  leave_meetings(*machine.running);
  leave_to_scheduler(kSwitched);
}

// Runs a fiber until it switches back; true: it failed.
bool resume(Fiber& fiber) {
  machine.running = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block->index;
  const int code = _setjmp(machine.scheduler);
  if (code == 0) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
  }
  machine.running = nullptr;
  return code == kFailed;
}

// Orders: any warp; one warp as long as it can run; by priorities that change now and then.
Warp* next_warp(Warp* last) {
  if (machine.order == 1 && last != nullptr && last->ready != 0 && machine.draw(64) != 0) return last;
  Warp* best = nullptr;
  uint32_t seen = 0;
  const bool change = machine.order == 2 && machine.draw(512) == 0;
  for (Block& block : machine.blocks) {
    for (Warp& warp : block.warps) {
      if (change && machine.draw(4) == 0) warp.priority = machine.draw(1 << 20);
      if (warp.ready == 0) continue;
      seen++;
      const bool better = machine.order == 2 ? best == nullptr || warp.priority > best->priority
                                             : machine.draw(seen) == 0;
      if (better) best = &warp;
    }
  }
  return best;
}

// Several lanes of a warp run after each other: other warps see no difference.
bool run_lanes(Warp& warp) {
  const uint32_t lanes = warp.ready, first = machine.draw(kLanes);
  const uint32_t most = machine.lanes_apart && machine.draw(8) == 0 ? 1 + machine.draw(kLanes) : kLanes;
  for (uint32_t i = 0; i < most; i++) {
    const uint32_t lane = (first + i) % kLanes;
    if ((lanes >> lane & 1) == 0) continue;
    warp.ready &= ~(1u << lane);
    if (resume(*warp.fibers[lane])) return false;
  }
  return true;
}

void complete_some_transfers() {
  if (machine.transfers.empty() || machine.delay == 0 || machine.draw(machine.delay) != 0) return;
  do {
    complete_transfer(machine.draw(machine.transfers.size()));
  } while (!machine.transfers.empty() && machine.draw(2) == 0);
}

void append(std::string& text, const char* format, ...) __attribute__((format(printf, 2, 3)));
void append(std::string& text, const char* format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  text += line;
}

// One line for all threads of a block that wait for the same.
std::string describe_deadlock() {
  std::string text = "deadlock: no thread can run";
  for (const Block& block : machine.blocks) {
    std::map<std::string, std::string> reasons;
    for (const Warp& warp : block.warps) {
      std::map<std::string, uint32_t> lanes;
      for (const Fiber* fiber : warp.fibers) {
        if (fiber != nullptr && fiber->state == State::kWaiting) lanes[describe_wait(*fiber)] |= 1u << fiber->lane;
      }
      for (const auto& [reason, mask] : lanes) {
        append(reasons[reason], mask == warp.live && mask == 0xffffffffu ? " %d" : " %d (lanes %08x)", warp.index, mask);
      }
    }
    for (const auto& [reason, warps] : reasons) {
      append(text, "\n  block (%u, %u) rank %u, warps", block.index.x, block.index.y, block.rank);
      text += warps + ": " + reason;
    }
  }
  return text;
}

bool run_cluster() {
  Warp* warp = nullptr;
  while (machine.live > 0 && machine.error.empty()) {
    complete_some_transfers();
    warp = next_warp(warp);
    if (warp != nullptr) {
      if (!run_lanes(*warp)) return false;
    } else if (!machine.transfers.empty()) {
      complete_transfer(machine.draw(machine.transfers.size()));
    } else {
      machine.error = describe_deadlock();
      return false;
    }
  }
  if (machine.error.empty()) check_end_of_cluster();
  return machine.error.empty();
}

void make_block(Block& block, unsigned rank, Index3 index, size_t first_stack) {
  const Index3 size = machine.launch.block;
  const size_t threads = static_cast<size_t>(size.x) * size.y * size.z;
  block.rank = rank;
  block.index = index;
  block.live = static_cast<int>(threads);
  block.warps.resize((threads + kLanes - 1) / kLanes);
  block.fibers.resize(threads);
  make_shared_memory(block);
  for (size_t i = 0; i < threads; i++) {
    Fiber& fiber = block.fibers[i];
    Warp& warp = block.warps[i / kLanes];
    fiber.block = &block;
    fiber.warp = &warp;
    fiber.lane = static_cast<int>(i % kLanes);
    fiber.thread = {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
                    static_cast<unsigned>(i / size.x / size.y)};
    fiber.stack = stack_number(first_stack + i);
    warp.block = &block;
    warp.index = static_cast<int>(i / kLanes);
    warp.fibers[fiber.lane] = &fiber;
    warp.live |= 1u << fiber.lane;
    warp.ready |= 1u << fiber.lane;
    warp.priority = machine.draw(1 << 20);
  }
}

void start_cluster(Index3 first) {
  const Launch& launch = machine.launch;
  const size_t threads = static_cast<size_t>(launch.block.x) * launch.block.y * launch.block.z;
  machine.blocks = std::vector<Block>(launch.cluster);
  machine.transfers.clear();
  machine.cluster_waiting.clear();
  machine.cluster_arrived = 0;
  machine.cluster_phase = 0;
  machine.live = static_cast<int>(threads * launch.cluster);
  for (unsigned rank = 0; rank < launch.cluster; rank++) {
    make_block(machine.blocks[rank], rank, {first.x + rank, first.y, first.z}, rank * threads);
  }
}

void end_cluster() {
  for (Block& block : machine.blocks) {
    unmap_region(block.dynamic_memory);
    unmap_region(block.static_memory);
  }
  machine.blocks.clear();
}

}  // namespace

uint64_t Machine::draw() {  // splitmix64
  uint64_t z = random += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

void set_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  fiber.warp->ready |= 1u << fiber.lane;
}

void switch_to_scheduler() {
  if (_setjmp(machine.running->context) == 0) _longjmp(machine.scheduler, kSwitched);
}

void leave_to_scheduler(int code) { _longjmp(machine.scheduler, code); }

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const Fiber& fiber = *machine.running;
  append(machine.error, "%s\n  in block (%u, %u) rank %u warp %d lane %d", text, fiber.block->index.x,
         fiber.block->index.y, fiber.block->rank, fiber.warp->index, fiber.lane);
  leave_to_scheduler(kFailed);
}

void wait_as(const char* what, uint32_t address, uint32_t parity) {
  Fiber& fiber = *machine.running;
  fiber.state = State::kWaiting;
  fiber.waits = what;
  fiber.address = address;
  fiber.parity = parity;
  switch_to_scheduler();
}

void wake(std::vector<Fiber*>& waiting) {
  for (Fiber* fiber : waiting) set_ready(*fiber);
  waiting.clear();
}

void spin() {
  set_ready(*machine.running);
  switch_to_scheduler();
}

void yield() {
  if (!machine.lanes_apart || machine.draw(4) == 0) spin();
}

void set_seed(uint64_t seed, bool lanes_apart) {
  machine.lanes_apart = lanes_apart;
  machine.random = seed * 0x9e3779b97f4a7c15u;
  constexpr uint32_t kDelays[4] = {1, 4, 64, 0};
  machine.order = static_cast<int>(machine.draw(3));
  machine.delay = kDelays[machine.draw(4)];
  machine.at_start = machine.draw(4) == 0;
}

bool run(const Launch& launch, const std::function<void()>& kernel) {
  machine.launch = launch;
  machine.kernel = &kernel;
  machine.error.clear();
  machine.static_offsets.clear();
  machine.static_used = 0;
  gridDim = launch.grid;
  blockDim = launch.block;
  std::vector<Index3> clusters;
  for (unsigned z = 0; z < launch.grid.z; z++) {
    for (unsigned y = 0; y < launch.grid.y; y++) {
      for (unsigned x = 0; x < launch.grid.x; x += launch.cluster) clusters.push_back({x, y, z});
    }
  }
  const FaultGuard guard;
  while (!clusters.empty()) {
    const size_t chosen = launch.in_order ? 0 : machine.draw(static_cast<uint32_t>(clusters.size()));
    start_cluster(clusters[chosen]);
    clusters.erase(clusters.begin() + static_cast<std::ptrdiff_t>(chosen));
    const bool done = run_cluster();
    end_cluster();
    if (!done) return false;
  }
  return true;
}

const char* error() { return machine.error.c_str(); }
void set_error(const char* text) { machine.error = text; }

unsigned cluster_rank() { return machine.running->block->rank; }
unsigned cluster_size() { return machine.launch.cluster; }
uint32_t draw(uint32_t below) { return machine.draw(below); }
std::shared_ptr<void>& warp_slot() { return machine.running->warp->slot; }
int lane() { return machine.running->lane; }

}  // namespace emulator
