// The state of the machine, shared by its source files.
#pragma once

#include <csetjmp>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace emulator {

constexpr uint8_t kPoison = 0xff;  // four of them are a NaN, as two and eight are
constexpr size_t kPage = 4096;
constexpr size_t kStaticBytes = 16 << 10;
constexpr uint32_t kStaticOffset = 1 << 10;  // the first kilobyte is the system's
constexpr uint32_t kDynamicOffset = 20 << 10;  // all addresses stay below 256 KiB, as descriptors of wgmma need it
constexpr size_t kSharedAlignment = 128;
constexpr unsigned kLanes = 32;

struct Block;
struct Warp;

enum class State : uint8_t { kReady, kWaiting, kDone };

struct Fiber {
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  Index3 thread;
  State state = State::kReady;
  bool started = false;
  bool cluster_arrived = false;
  uint64_t cluster_phase = 0;
  const char* waits = "";  // for what: a name,
  uint32_t address = 0;    // and the barrier's address or number
  uint32_t parity = 0;
  uint8_t* stack = nullptr;
  jmp_buf context;
};

struct Collective {
  const char* name = nullptr;
  uint32_t mask = 0, arrived = 0;
  void (*combine)(const Lanes&) = nullptr;
  Lanes lanes;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  uint32_t live = 0, ready = 0;  // by lane
  double priority = 0;
  Fiber* fibers[kLanes] = {};
  std::vector<Collective> meetings;
  std::shared_ptr<void> slot;
};

struct Barrier {
  uint32_t count = 0, pending = 0;
  int64_t bytes = 0;  // that are expected and have not come
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  std::vector<Fiber*> waiting;
};

// Memory between two pages that cannot be touched.
struct Region {
  uint8_t *mapping = nullptr, *begin = nullptr;
  size_t mapped = 0, bytes = 0, copied = 0;
  std::string name;
  bool contains(const void* pointer, size_t length = 1) const {
    const uint8_t* at = static_cast<const uint8_t*>(pointer);
    return at >= begin && length <= bytes && at <= begin + bytes - length;
  }
};
Region map_region(const std::string& name, size_t bytes, size_t alignment, bool at_start);
void unmap_region(Region& region);

struct Block {
  unsigned rank = 0;
  Index3 index;
  int live = 0;
  Region dynamic_memory, static_memory;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::unordered_map<uint32_t, Barrier> barriers;  // by offset
  std::map<int, NamedBarrier> named;
};

struct Transfer {
  uint8_t* to = nullptr;
  const uint8_t* from = nullptr;  // or `value`
  std::vector<uint8_t> value;
  uint32_t bytes = 0;
  uint32_t barrier = 0;  // by address
  bool arrives = false;  // one arrival instead of bytes
  const Fiber* order = nullptr;  // in turn with the others of this fiber
};

struct Machine {
  Launch launch;
  std::vector<Block> blocks;  // of the cluster that runs
  std::vector<Transfer> transfers;
  std::map<const void*, uint32_t> static_offsets;
  size_t static_used = 0;
  uint64_t cluster_phase = 0;
  int cluster_arrived = 0, live = 0;
  std::vector<Fiber*> cluster_waiting;
  std::vector<Region> buffers;
  Fiber* running = nullptr;
  jmp_buf scheduler;
  std::string error;
  uint64_t random = 1;
  int order = 0;       // how the next fiber is chosen
  uint32_t delay = 0;  // one of so many steps completes a copy; 0: when nothing else can happen
  bool lanes_apart = true;
  bool at_start = false;  // buffers lie at the start of their pages
  const std::function<void()>* kernel = nullptr;

  uint64_t draw();  // 64 random bits
  uint32_t draw(uint32_t below) { return static_cast<uint32_t>((draw() >> 32) * below >> 32); }
};

extern Machine machine;

void set_ready(Fiber& fiber);
void switch_to_scheduler();          // until set_ready()
void leave_meetings(Fiber& fiber);  // of a thread that ends: others need not wait for it
void wait_as(const char* what, uint32_t address, uint32_t parity);  // until wake()
void wake(std::vector<Fiber*>& waiting);
void complete_transfer(size_t i);
[[noreturn]] void leave_to_scheduler(int code);  // from a fiber for good
std::string describe_wait(const Fiber& fiber);
std::string describe_address(const void* pointer);
void check_end_of_cluster();  // sets machine.error
void make_shared_memory(Block& block);

constexpr int kFailed = 2;
struct FaultGuard {  // signals of bad accesses end the launch, while this exists
  FaultGuard();
  ~FaultGuard();
};

}  // namespace emulator
