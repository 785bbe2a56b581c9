// Memory: buffers in global memory, shared memory and its addresses, barriers there, asynchronous copies.
#include <sys/mman.h>

#include <cstdio>
#include <cstring>

#include "state.h"

namespace emulator {

namespace {

constexpr uint64_t kBarrierTag = 0x6265722d7a6f6e65u;  // in the 8 bytes of each barrier
constexpr int64_t kMostBytes = (1 << 20) - 1;          // that a barrier can count

Block* block_of_rank(uint32_t rank) {
  return rank < machine.blocks.size() ? &machine.blocks[rank] : nullptr;
}

// The part of a block's memory with this offset; null: there is none.
uint8_t* find_shared(const Block& block, uint32_t offset, size_t bytes) {
  const bool dynamic = offset >= kDynamicOffset;
  const Region& region = dynamic ? block.dynamic_memory : block.static_memory;
  const uint32_t start = dynamic ? kDynamicOffset : kStaticOffset;
  if (offset < start || offset - start > region.bytes || bytes > region.bytes - (offset - start)) return nullptr;
  return region.begin + (offset - start);
}

Barrier& barrier_at(uint32_t address, Scope scope, const char* what) {
  const uint8_t* tag = shared_pointer(address, 8, 8, scope, what);
  Block& block = machine.blocks[address >> 24];
  const auto found = block.barriers.find(address & 0x00ffffffu);
  if (found == block.barriers.end()) fail("%s: no barrier was initialized at shared %08x", what, address);
  if (memcmp(tag, &kBarrierTag, 8) != 0) fail("%s: the barrier at shared %08x was written over", what, address);
  return found->second;
}

void complete_phase(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  barrier.phase++;
  wake(barrier.waiting);
}

void change_bytes(Barrier& barrier, uint32_t address, int64_t bytes) {
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBytes || barrier.bytes < -kMostBytes) {
    fail("barrier at shared %08x: %lld bytes are more than it can count", address,
         static_cast<long long>(barrier.bytes));
  }
}

void check_global(const void* from, uint32_t bytes, const char* what) {
  for (Region& buffer : machine.buffers) {
    if (!buffer.contains(from, bytes)) continue;
    buffer.copied += bytes;
    return;
  }
  fail("%s: %u bytes from %s are not global memory", what, bytes, describe_address(from).c_str());
}

void check_copy(uint32_t to, const void* from, uint32_t bytes, const char* what) {
  if (bytes == 0 || bytes % 16 != 0) fail("%s: %u bytes are no multiple of 16", what, bytes);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("%s: the source %p is not aligned to 16 bytes", what, from);
  if (to % 16 != 0) fail("%s: the target shared %08x is not aligned to 16 bytes", what, to);
}

void start_transfer(Transfer transfer) {
  memset(transfer.to, kPoison, transfer.bytes);
  machine.transfers.push_back(std::move(transfer));
  yield();
}

void start_counted(uint32_t to, const void* from, std::vector<uint8_t> value, uint32_t bytes, uint32_t barrier,
                   const char* what) {
  if (to >> 24 != barrier >> 24) fail("%s: target %08x and barrier %08x are of two blocks", what, to, barrier);
  barrier_at(barrier, Scope::kCluster, what);
  Transfer transfer;
  transfer.to = shared_pointer(to, bytes, 4, Scope::kCluster, what);
  transfer.from = static_cast<const uint8_t*>(from);
  transfer.value = std::move(value);
  transfer.bytes = bytes;
  transfer.barrier = barrier;
  start_transfer(std::move(transfer));
}

}  // namespace

// --- regions and buffers -------------------------------------------------------------------------------------------

Region map_region(const std::string& name, size_t bytes, size_t alignment, bool at_start) {
  Region region;
  const size_t padded = (bytes + alignment - 1) / alignment * alignment;
  const size_t inner = (padded + kPage - 1) / kPage * kPage;
  region.mapped = inner + 2 * kPage;
  region.mapping = static_cast<uint8_t*>(
      mmap(nullptr, region.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  memset(region.mapping, kPoison, region.mapped);
  mprotect(region.mapping, kPage, PROT_NONE);
  mprotect(region.mapping + kPage + inner, kPage, PROT_NONE);
  region.begin = region.mapping + kPage + (at_start ? 0 : inner - padded);
  region.bytes = bytes;
  region.name = name;
  return region;
}

void unmap_region(Region& region) {
  if (region.mapping != nullptr) munmap(region.mapping, region.mapped);
  region = Region();
}

void GlobalBuffer::make(const char* name, const void* data, size_t bytes) {
  if (data == nullptr) return;
  machine.buffers.push_back(map_region(name, bytes, 16, machine.at_start));
  inside_ = machine.buffers.back().begin;
  bytes_ = bytes;
  memcpy(inside_, data, bytes);
}

GlobalBuffer::GlobalBuffer(const char* name, const void* data, size_t bytes) {
  make(name, data, bytes);
  if (data == nullptr) return;
  const Region& region = machine.buffers.back();
  mprotect(region.mapping + kPage, region.mapped - 2 * kPage, PROT_READ);
}

GlobalBuffer::GlobalBuffer(const char* name, void* data, size_t bytes) : original_(data) { make(name, data, bytes); }

size_t GlobalBuffer::copied() const {
  for (const Region& buffer : machine.buffers) {
    if (buffer.begin == inside_) return buffer.copied;
  }
  return 0;
}

GlobalBuffer::~GlobalBuffer() {
  if (original_ != nullptr) memcpy(original_, inside_, bytes_);
  for (size_t i = 0; i < machine.buffers.size(); i++) {
    if (machine.buffers[i].begin != inside_) continue;
    unmap_region(machine.buffers[i]);
    machine.buffers.erase(machine.buffers.begin() + static_cast<long>(i));
    return;
  }
}

// --- shared memory -------------------------------------------------------------------------------------------------

void make_shared_memory(Block& block) {
  block.dynamic_memory =
      map_region("dynamic shared memory", machine.launch.shared_bytes, kSharedAlignment, machine.at_start);
  block.static_memory = map_region("static shared memory", kStaticBytes, kSharedAlignment, true);
}

void* dynamic_shared() { return machine.running->block->dynamic_memory.begin; }

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  const auto found = machine.static_offsets.find(key);
  if (found != machine.static_offsets.end()) return machine.running->block->static_memory.begin + found->second;
  const size_t offset = (machine.static_used + alignment - 1) / alignment * alignment;
  if (offset + bytes > kStaticBytes) fail("more than %zu bytes of static shared memory", kStaticBytes);
  machine.static_used = offset + bytes;
  machine.static_offsets[key] = static_cast<uint32_t>(offset);
  return machine.running->block->static_memory.begin + offset;
}

uint32_t shared_address(const void* pointer) {
  const Block& block = *machine.running->block;
  const uint8_t* at = static_cast<const uint8_t*>(pointer);
  const uint32_t rank = block.rank << 24;
  // one past the end is an address, too: of an empty array
  if (block.dynamic_memory.contains(at, 0)) {
    return rank | static_cast<uint32_t>(kDynamicOffset + (at - block.dynamic_memory.begin));
  }
  if (block.static_memory.contains(at, 0)) {
    return rank | static_cast<uint32_t>(kStaticOffset + (at - block.static_memory.begin));
  }
  fail("%s is no shared memory of this block", describe_address(pointer).c_str());
}

uint8_t* shared_pointer(uint32_t address, size_t bytes, size_t alignment, Scope scope, const char* what) {
  Block* block = block_of_rank(address >> 24);
  if (block == nullptr) fail("%s: shared %08x is of no block of the cluster", what, address);
  if (scope == Scope::kOwn && block != machine.running->block) {
    fail("%s: shared %08x is memory of another block", what, address);
  }
  if (block->live == 0) fail("%s: shared %08x is memory of a block that has ended", what, address);
  if (address % alignment != 0) fail("%s: shared %08x is not aligned to %zu bytes", what, address, alignment);
  uint8_t* pointer = find_shared(*block, address & 0x00ffffffu, bytes);
  if (pointer == nullptr) fail("%s: %zu bytes from shared %08x are out of bounds", what, bytes, address);
  return pointer;
}

// --- barriers ------------------------------------------------------------------------------------------------------

void barrier_init(uint32_t address, uint32_t count) {
  uint8_t* tag = shared_pointer(address, 8, 8, Scope::kOwn, "barrier_init");
  if (count == 0 || count >= 1u << 20) fail("barrier_init: %u arrivals at shared %08x", count, address);
  Block& block = *machine.running->block;
  if (!block.barriers.try_emplace(address & 0x00ffffffu, Barrier{count, count, 0, 0, {}}).second) {
    fail("barrier_init: there is a barrier at shared %08x already", address);
  }
  memcpy(tag, &kBarrierTag, 8);
}

void barrier_arrive(uint32_t address, Scope scope, uint32_t count) {
  Barrier& barrier = barrier_at(address, scope, "barrier_arrive");
  if (barrier.pending < count) fail("barrier_arrive: more arrivals than %u at shared %08x", barrier.count, address);
  barrier.pending -= count;
  complete_phase(barrier);
  yield();
}

void barrier_expect(uint32_t address, uint32_t bytes, Scope scope) {
  change_bytes(barrier_at(address, scope, "barrier_expect"), address, bytes);
}

bool barrier_done(uint32_t address, uint32_t parity) {
  if (parity > 1) fail("barrier_wait: parity %u at shared %08x", parity, address);
  return (barrier_at(address, Scope::kOwn, "barrier_wait").phase & 1) != parity;
}

void barrier_wait(uint32_t address, uint32_t parity) {
  while (!barrier_done(address, parity)) {
    barrier_at(address, Scope::kOwn, "barrier_wait").waiting.push_back(machine.running);
    wait_as("barrier_wait", address, parity);
  }
}

std::string describe_wait(const Fiber& fiber) {
  char text[256];
  const Block& block = machine.blocks[fiber.address >> 24 < machine.blocks.size() ? fiber.address >> 24 : 0];
  const auto found = block.barriers.find(fiber.address & 0x00ffffffu);
  if (strcmp(fiber.waits, "barrier_wait") == 0 && found != block.barriers.end()) {
    const Barrier& barrier = found->second;
    const uint32_t offset = (fiber.address & 0x00ffffffu) - kDynamicOffset;
    snprintf(text, sizeof text,
             "barrier_wait at byte %u of shared memory (8 * %u), parity %u: in phase %llu, %u of %u arrivals and %lld "
             "bytes missing",
             offset, offset / 8, fiber.parity, static_cast<unsigned long long>(barrier.phase), barrier.pending,
             barrier.count, static_cast<long long>(barrier.bytes));
  } else if (strcmp(fiber.waits, "block barrier") == 0) {
    const NamedBarrier& barrier = fiber.block->named.at(static_cast<int>(fiber.address));
    snprintf(text, sizeof text, "barrier %u of the block: %d of %d threads are there (0: all %d that run)",
             fiber.address, barrier.arrived, barrier.threads, fiber.block->live);
  } else if (strcmp(fiber.waits, "cluster barrier") == 0) {
    snprintf(text, sizeof text, "cluster_wait: %d of %d threads arrived", machine.cluster_arrived, machine.live);
  } else {
    snprintf(text, sizeof text, "%s, mask %08x", fiber.waits, fiber.address);
  }
  return text;
}

// --- asynchronous copies -------------------------------------------------------------------------------------------

void complete_transfer(size_t chosen) {
  // those of one thread keep their order: the first one of it stands for any of them
  for (size_t i = 0; i < chosen; i++) {
    if (machine.transfers[chosen].order != nullptr && machine.transfers[i].order == machine.transfers[chosen].order) {
      chosen = i;
    }
  }
  const Transfer transfer = std::move(machine.transfers[chosen]);
  machine.transfers.erase(machine.transfers.begin() + static_cast<long>(chosen));
  if (transfer.bytes > 0) {
    memcpy(transfer.to, transfer.value.empty() ? transfer.from : transfer.value.data(), transfer.bytes);
  }
  if (transfer.barrier == 0) return;
  Block& block = machine.blocks[transfer.barrier >> 24];
  Barrier& barrier = block.barriers.at(transfer.barrier & 0x00ffffffu);
  if (block.live == 0) machine.error = "an asynchronous copy was done after the block had ended to which it goes";
  if (transfer.arrives) {
    if (barrier.pending == 0) machine.error = "more copies arrived at a barrier than it counts";
    barrier.pending--;
  } else {
    barrier.bytes -= transfer.bytes;
  }
  complete_phase(barrier);
}

void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (to >> 24 != barrier >> 24) fail("copy_bytes: target %08x and barrier %08x are of two blocks", to, barrier);
  copy_bytes_multicast(to & 0x00ffffffu, from, bytes, barrier & 0x00ffffffu, 1u << (to >> 24));
}

void copy_bytes_multicast(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint32_t ranks) {
  if (ranks == 0 || ranks >> cluster_size() != 0) fail("copy_bytes_multicast: blocks %x of the cluster", ranks);
  check_copy(to, from, bytes, "copy_bytes");
  check_global(from, bytes, "copy_bytes");
  for (uint32_t rank = 0; rank < cluster_size(); rank++) {
    if (ranks >> rank & 1) {
      start_counted(map_address(to, rank), from, {}, bytes, map_address(barrier, rank), "copy_bytes");
    }
  }
}

void copy_bytes_shared(uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier) {
  const uint8_t* source = shared_pointer(from, bytes, 16, Scope::kOwn, "copy_bytes_shared");
  if (bytes == 0 || (bytes | to) % 16 != 0) fail("copy_bytes_shared: %u bytes to shared %08x", bytes, to);
  start_counted(to, source, {}, bytes, barrier, "copy_bytes_shared");
}

void store_async(uint32_t to, const void* value, uint32_t bytes, uint32_t barrier) {
  if (bytes == 0 || to % bytes != 0) fail("store_async: shared %08x is not aligned to %u bytes", to, bytes);
  const uint8_t* begin = static_cast<const uint8_t*>(value);
  start_counted(to, nullptr, {begin, begin + bytes}, bytes, barrier, "store_async");
}

void copy_of_thread(uint32_t to, const void* from, uint32_t bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("copy_of_thread: %u bytes", bytes);
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0) fail("copy_of_thread: the source %p is not aligned", from);
  check_global(from, bytes, "copy_of_thread");
  Transfer transfer;
  transfer.to = shared_pointer(to, bytes, bytes, Scope::kOwn, "copy_of_thread");
  transfer.from = static_cast<const uint8_t*>(from);
  transfer.bytes = bytes;
  transfer.order = machine.running;
  start_transfer(std::move(transfer));
}

void arrive_after_copies(uint32_t barrier) {
  barrier_at(barrier, Scope::kOwn, "arrive_after_copies");
  Transfer transfer;
  transfer.barrier = barrier;
  transfer.arrives = true;
  transfer.order = machine.running;
  start_transfer(std::move(transfer));
}

// What lies around a region on its pages is as it was.
static void check_edges(const Region& region) {
  const uint8_t *first = region.mapping + kPage, *last = region.mapping + region.mapped - kPage;
  for (const uint8_t* at = first; at < last; at++) {
    if (at == region.begin) at += region.bytes;
    if (at < last && *at != kPoison) machine.error = "something was written to " + describe_address(at);
  }
}

void check_end_of_cluster() {
  for (const Region& buffer : machine.buffers) check_edges(buffer);
  for (const Block& block : machine.blocks) check_edges(block.dynamic_memory);
  if (!machine.transfers.empty()) {
    machine.error = std::to_string(machine.transfers.size()) + " asynchronous copies were not done when all threads " +
                    "of a cluster had ended";
  }
  for (const Block& block : machine.blocks) {
    for (const auto& [offset, barrier] : block.barriers) {
      if (barrier.bytes != 0) machine.error = "a barrier waits for bytes that never come, after the end of its block";
    }
  }
}

std::string describe_address(const void* pointer) {
  char text[128];
  const uint8_t* at = static_cast<const uint8_t*>(pointer);
  auto describe = [&](const Region& region) {
    const bool inside = at >= region.mapping && at < region.mapping + region.mapped;
    if (inside) {
      snprintf(text, sizeof text, "byte %td of %zu of %s", at - region.begin, region.bytes, region.name.c_str());
    }
    return inside;
  };
  for (const Region& buffer : machine.buffers) {
    if (describe(buffer)) return text;
  }
  for (const Block& block : machine.blocks) {
    if (describe(block.dynamic_memory) || describe(block.static_memory)) {
      return std::string(text) + " of rank " + std::to_string(block.rank);
    }
  }
  snprintf(text, sizeof text, "address %p", pointer);
  return text;
}

}  // namespace emulator
