// A machine that runs grids of thread blocks on one CPU thread, for tests of the kernels without a GPU.
//
// Every CUDA thread is a fiber that runs until it waits for something; which one runs next, and when an asynchronous
// copy is done, is drawn from a seed. Blocks of a cluster run together, clusters one after another. Whatever a GPU would
// not forgive (a wait that never ends, memory that is not there, a barrier that is none) ends the launch with an error.
//
// A shared-memory address is, as on the device, the rank of a block in its cluster << 24 | an offset in its memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace emulator {

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
};

// Ends the launch with this error; to be called by a running fiber only.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// --- launches ------------------------------------------------------------------------------------------------------

struct Launch {
  Index3 grid, block;
  size_t shared_bytes = 0;  // dynamic
  unsigned cluster = 1;     // blocks, along x
  bool in_order = false;    // clusters start by their number, as a GPU starts them; else in any order
};

// Draws of the launches that follow come from this seed. lanes_apart: lanes of a warp that can run need not run
// together; without it they go apart only where one waits and another does not.
void set_seed(uint64_t seed, bool lanes_apart = true);

// Runs the kernel; false: it failed, and error() says how.
bool run(const Launch& launch, const std::function<void()>& kernel);
const char* error();
void set_error(const char* text);

// A copy of a buffer between pages that cannot be touched: the start, or the end (by 16 bytes), is at the edge. Only
// what lies in these copies is global memory. Written back at the end where it is not constant.
class GlobalBuffer {
 public:
  GlobalBuffer(const char* name, const void* data, size_t bytes);  // constant
  GlobalBuffer(const char* name, void* data, size_t bytes);
  ~GlobalBuffer();
  GlobalBuffer(const GlobalBuffer&) = delete;
  GlobalBuffer& operator=(const GlobalBuffer&) = delete;
  void* get() const { return inside_; }  // null for null
  size_t copied() const;                 // bytes that asynchronous copies have read; once for a multicast

 private:
  void make(const char* name, const void* data, size_t bytes);
  void* original_ = nullptr;
  void* inside_ = nullptr;
  size_t bytes_ = 0;
};

// --- what a thread sees --------------------------------------------------------------------------------------------

unsigned cluster_rank();
unsigned cluster_size();
int lane();
uint32_t draw(uint32_t below);  // a random number, of the seed
void spin();   // lets others run: for loops that poll memory
void yield();  // the same now and then, so that lanes go apart; all lanes do it where they shall not

// --- shared memory -------------------------------------------------------------------------------------------------

void* dynamic_shared();
void* static_shared(const void* key, size_t bytes, size_t alignment);
template <class T, class Key>
T& static_shared(Key) {
  static const char key = 0;
  return *static_cast<T*>(static_shared(&key, sizeof(T), alignof(T) < 16 ? 16 : alignof(T)));
}

uint32_t shared_address(const void* pointer);
// Where an address lies on this machine; an error unless `bytes` from there are shared memory of a running block.
// kOwn: of this block.
enum class Scope { kOwn, kCluster };
uint8_t* shared_pointer(uint32_t address, size_t bytes, size_t alignment, Scope scope, const char* what);
inline uint32_t map_address(uint32_t address, uint32_t rank) { return (address & 0x00ffffffu) | rank << 24; }

// --- barriers in shared memory (mbarrier) --------------------------------------------------------------------------

void barrier_init(uint32_t barrier, uint32_t count);
void barrier_arrive(uint32_t barrier, Scope scope, uint32_t count = 1);
void barrier_expect(uint32_t barrier, uint32_t bytes, Scope scope);  // without an arrival
bool barrier_done(uint32_t barrier, uint32_t parity);
void barrier_wait(uint32_t barrier, uint32_t parity);

// --- asynchronous copies: done some time later, in any order; what they write is NaN until then ---------------------

// Counts its bytes at a barrier of the block to which it copies. The source is read when it is done.
void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
// The same with a value that is read now (st.async).
void store_async(uint32_t to, const void* value, uint32_t bytes, uint32_t barrier);
// The first, to the same place in all blocks of the cluster whose bit is set, with the barriers there.
void copy_bytes_multicast(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint32_t ranks);
// From shared to shared memory of the cluster.
void copy_bytes_shared(uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier);
// Of sm_80, in the order in which a thread asks for them.
void copy_of_thread(uint32_t to, const void* from, uint32_t bytes);
void arrive_after_copies(uint32_t barrier);  // an arrival when all of this thread's copies so far are done

// --- barriers of blocks and clusters -------------------------------------------------------------------------------

void block_barrier(int id, int threads, bool wait = true);  // threads 0: all of the block
void cluster_arrive();
void cluster_wait();

// --- functions of a whole warp -------------------------------------------------------------------------------------

struct Lanes {
  uint32_t present;  // by lane, of those in the mask that still run
  const void* in[32];
  void* out[32];
};

// Whatever functions of a warp have to keep from one call to the next; gone when the block ends.
std::shared_ptr<void>& warp_slot();

// All lanes of the mask meet here; the last one computes the results of all.
void collective(const char* name, uint32_t mask, const void* in, void* out, void (*combine)(const Lanes&));

}  // namespace emulator

extern emulator::Index3 threadIdx, blockIdx, blockDim, gridDim;
