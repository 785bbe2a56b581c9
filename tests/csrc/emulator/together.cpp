// What threads of a warp, a block and a cluster do together.
#include <cstring>

#include "state.h"

namespace emulator {

namespace {

void check_meetings(Warp& warp) {
  for (size_t i = 0; i < warp.meetings.size();) {
    Collective& meeting = warp.meetings[i];
    if (meeting.arrived != (meeting.mask & warp.live) || meeting.arrived == 0) {
      i++;
      continue;
    }
    meeting.lanes.present = meeting.arrived;
    if (meeting.combine != nullptr) meeting.combine(meeting.lanes);
    for (unsigned lane = 0; lane < kLanes; lane++) {
      if (meeting.arrived >> lane & 1) set_ready(*warp.fibers[lane]);
    }
    warp.meetings.erase(warp.meetings.begin() + static_cast<long>(i));
  }
}

bool block_barrier_full(const Block& block, const NamedBarrier& barrier) {
  return barrier.arrived > 0 && barrier.arrived >= (barrier.threads == 0 ? block.live : barrier.threads);
}

void check_block_barriers(Block& block) {
  for (auto& [id, barrier] : block.named) {
    if (!block_barrier_full(block, barrier)) continue;
    barrier.arrived = 0;
    wake(barrier.waiting);
  }
}

void check_cluster_barrier() {
  if (machine.cluster_arrived < machine.live || machine.live == 0 || machine.cluster_arrived == 0) return;
  machine.cluster_arrived = 0;
  machine.cluster_phase++;
  wake(machine.cluster_waiting);
}

}  // namespace

void leave_meetings(Fiber& fiber) {
  fiber.state = State::kDone;
  fiber.warp->live &= ~(1u << fiber.lane);
  fiber.block->live--;
  machine.live--;
  if (fiber.cluster_arrived && fiber.cluster_phase == machine.cluster_phase) machine.cluster_arrived--;
  // who waits for all threads that still run may go on
  check_meetings(*fiber.warp);
  check_block_barriers(*fiber.block);
  check_cluster_barrier();
}

void collective(const char* name, uint32_t mask, const void* in, void* out, void (*combine)(const Lanes&)) {
  Fiber& fiber = *machine.running;
  Warp& warp = *fiber.warp;
  const uint32_t me = 1u << fiber.lane;
  if ((mask & me) == 0) fail("%s: the mask %08x lacks the lane that calls", name, mask);
  Collective* found = nullptr;
  for (Collective& meeting : warp.meetings) {
    if ((meeting.mask & mask) == 0) continue;
    if (meeting.mask != mask || strcmp(meeting.name, name) != 0) {
      fail("lanes went apart: this one is at %s (mask %08x), lanes %08x are at %s (mask %08x)", name, mask,
           meeting.arrived, meeting.name, meeting.mask);
    }
    found = &meeting;
  }
  if (found == nullptr) {
    warp.meetings.emplace_back();
    found = &warp.meetings.back();
    found->name = name;
    found->mask = mask;
    found->combine = combine;
  }
  found->arrived |= me;
  found->lanes.in[fiber.lane] = in;
  found->lanes.out[fiber.lane] = out;
  fiber.state = State::kWaiting;
  check_meetings(warp);  // may make this lane ready, too
  fiber.waits = name;
  fiber.address = mask;
  switch_to_scheduler();
}

void block_barrier(int id, int threads, bool wait) {
  if (id < 0 || id > 15) fail("barrier %d: there are only 0 to 15", id);
  if (threads % 32 != 0) fail("barrier %d: %d threads are no whole warps", id, threads);
  collective("the other lanes at a barrier of the block", 0xffffffffu, nullptr, nullptr, nullptr);
  Fiber& fiber = *machine.running;
  NamedBarrier& barrier = fiber.block->named[id];
  if (barrier.arrived > 0 && barrier.threads != threads) {
    fail("barrier %d: some threads ask for %d threads, others for %d", id, barrier.threads, threads);
  }
  barrier.threads = threads;
  barrier.arrived++;
  if (block_barrier_full(*fiber.block, barrier)) {
    barrier.arrived = 0;
    wake(barrier.waiting);
    yield();
  } else if (wait) {
    barrier.waiting.push_back(&fiber);
    wait_as("block barrier", static_cast<uint32_t>(id), 0);
  }
}

void cluster_arrive() {
  Fiber& fiber = *machine.running;
  if (fiber.cluster_arrived) fail("cluster_arrive twice without cluster_wait");
  fiber.cluster_arrived = true;
  fiber.cluster_phase = machine.cluster_phase;
  machine.cluster_arrived++;
  check_cluster_barrier();
  yield();
}

void cluster_wait() {
  Fiber& fiber = *machine.running;
  if (!fiber.cluster_arrived) fail("cluster_wait without cluster_arrive");
  while (machine.cluster_phase == fiber.cluster_phase) {
    machine.cluster_waiting.push_back(&fiber);
    wait_as("cluster barrier", 0, 0);
  }
  fiber.cluster_arrived = false;
}

}  // namespace emulator
