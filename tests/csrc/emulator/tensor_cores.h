// Products of 8-bit integers on tensor cores: mma.m16n8k32 of a warp, and wgmma.m64nNk32 of four warps, of which each
// has 16 rows, with the weight in registers and the activations in shared memory.
//
// Fragments (both instructions): lane 4 i + q has of the 16 x 32 weight rows i and i + 8, and of the 16 x 8 sums
// d[0], d[1]: row i, columns 2 q, 2 q + 1; d[2], d[3]: row i + 8.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "machine.h"

namespace emulator {

struct WeightFragment {
  int rows[16][32];

  void put(int lane, const uint32_t* a, bool is_signed) {
    for (int r = 0; r < 4; r++) {
      for (int m = 0; m < 4; m++) {
        const uint32_t byte = a[r] >> 8 * m & 255;
        rows[lane / 4 + 8 * (r % 2)][16 * (r / 2) + 4 * (lane % 4) + m] =
            is_signed ? static_cast<int8_t>(byte) : static_cast<int>(byte);
      }
    }
  }
  // One of the four sums of a lane: number r; `column` has 32 inputs.
  int dot(int lane, int r, const int8_t* column) const {
    int sum = 0;
    for (int k = 0; k < 32; k++) sum += rows[lane / 4 + 8 * (r / 2)][k] * column[k];
    return sum;
  }
};

// --- mma -----------------------------------------------------------------------------------------------------------

struct MultiplyOperands {
  uint32_t a[4], b[2];
};

template <bool kSigned>
void multiply_lanes(const Lanes& lanes) {
  if (lanes.present != 0xffffffffu) fail("multiply: by lanes %08x only", lanes.present);
  WeightFragment weight;
  int8_t columns[8][32];
  for (int lane = 0; lane < 32; lane++) {
    const auto& operands = *static_cast<const MultiplyOperands*>(lanes.in[lane]);
    weight.put(lane, operands.a, kSigned);
    for (int r = 0; r < 2; r++) memcpy(columns[lane / 4] + 16 * r + 4 * (lane % 4), &operands.b[r], 4);
  }
  for (int lane = 0; lane < 32; lane++) {
    for (int r = 0; r < 4; r++) {
      static_cast<int*>(lanes.out[lane])[r] += weight.dot(lane, r, columns[2 * (lane % 4) + r % 2]);
    }
  }
}

// --- wgmma ---------------------------------------------------------------------------------------------------------

// Place of input k (a byte) of column n in shared memory, by the 64-bit matrix descriptor, K-major.
inline uint32_t described_address(uint64_t descriptor, uint32_t n, uint32_t k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4, swizzle = static_cast<uint32_t>(descriptor >> 62);
  if (swizzle == 0) return start + n / 8 * stride + k / 16 * leading + n % 8 * 16 + k % 16;
  const uint32_t row = 256u >> swizzle;  // 1: 128 bytes, 2: 64, 3: 32
  const uint32_t plain = start + n / 8 * stride + n % 8 * row + k;
  return plain ^ (plain >> 7 & (row / 16 - 1)) << 4;
}

// Sums are NaN-like until they are waited for. Shared memory is read at once or when they are waited for, by chance.
struct GroupMultiply {
  WeightFragment weight;
  uint64_t descriptor;
  int tiles;
  bool read = false, committed = false;
  std::vector<int8_t> columns;
  int* sums[32];
  std::vector<int> base[32];  // sums before this product; empty: those of the product before it

  void read_columns() {
    read = true;
    columns.resize(static_cast<size_t>(tiles) * 8 * 32);
    for (uint32_t n = 0; n < 8u * static_cast<uint32_t>(tiles); n++) {
      for (uint32_t k = 0; k < 32; k++) {
        const uint32_t address = map_address(described_address(descriptor, n, k), cluster_rank());
        columns[32 * n + k] = static_cast<int8_t>(*shared_pointer(address, 1, 1, Scope::kOwn, "wgmma"));
      }
    }
  }
};

struct GroupMultiplies {
  std::vector<GroupMultiply> pending;

  void finish_first() {
    GroupMultiply& first = pending.front();
    if (!first.read) first.read_columns();
    for (int lane = 0; lane < 32; lane++) {
      std::vector<int>& sums = first.base[lane];
      for (int t = 0; t < first.tiles; t++) {
        for (int r = 0; r < 4; r++) {
          const int column = 8 * t + 2 * (lane % 4) + r % 2;
          sums[4 * t + r] += first.weight.dot(lane, r, first.columns.data() + 32 * column);
        }
      }
      auto next = std::find_if(pending.begin() + 1, pending.end(),
                               [&](const GroupMultiply& other) { return other.sums[lane] == first.sums[lane]; });
      if (next == pending.end()) {
        memcpy(first.sums[lane], sums.data(), 4 * sums.size());
      } else if (next->base[lane].empty()) {
        next->base[lane] = sums;
      }
    }
    pending.erase(pending.begin());
  }
};

inline GroupMultiplies& group_multiplies() {
  std::shared_ptr<void>& slot = warp_slot();
  if (slot == nullptr) slot = std::make_shared<GroupMultiplies>();
  return *static_cast<GroupMultiplies*>(slot.get());
}

struct GroupOperands {
  const uint32_t* a;
  uint64_t descriptor;
  bool accumulate;
};

// d (NT tiles of 8 columns, 4 sums each) = or += a b.
template <bool kSigned, int NT>
void group_multiply(int* d, const uint32_t* a, uint64_t descriptor, bool accumulate) {
  const GroupOperands operands = {a, descriptor, accumulate};
  collective(kSigned ? "wgmma signed" : "wgmma", 0xffffffffu, &operands, d, [](const Lanes& lanes) {
    std::vector<GroupMultiply>& pending = group_multiplies().pending;
    GroupMultiply product;
    product.tiles = NT;
    for (int lane = 0; lane < 32; lane++) {
      const auto& own = *static_cast<const GroupOperands*>(lanes.in[lane]);
      if (lane > 0 && own.descriptor != product.descriptor) fail("wgmma: lanes have different descriptors");
      product.descriptor = own.descriptor;
      product.weight.put(lane, own.a, kSigned);
      product.sums[lane] = static_cast<int*>(lanes.out[lane]);
      const bool chained = std::any_of(pending.begin(), pending.end(), [&](const GroupMultiply& other) {
        return other.sums[lane] == product.sums[lane];
      });
      if (!own.accumulate) {
        product.base[lane].assign(4 * NT, 0);
      } else if (!chained) {
        product.base[lane].assign(product.sums[lane], product.sums[lane] + 4 * NT);
      }
      memset(product.sums[lane], 0x7f, 16 * NT);
    }
    if (draw(2) == 0) product.read_columns();
    pending.push_back(std::move(product));
  });
}

inline void group_commit() {
  collective("wgmma commit", 0xffffffffu, nullptr, nullptr, [](const Lanes&) {
    // the last product of a group carries the mark
    std::vector<GroupMultiply>& pending = group_multiplies().pending;
    if (!pending.empty()) pending.back().committed = true;
  });
}

// Until at most kLeft groups are not done.
template <int kLeft>
void group_wait() {
  collective("wgmma wait", 0xffffffffu, nullptr, nullptr, [](const Lanes&) {
    GroupMultiplies& all = group_multiplies();
    auto groups = [&] {
      return std::count_if(all.pending.begin(), all.pending.end(), [](const GroupMultiply& p) { return p.committed; });
    };
    while (groups() > kLeft) all.finish_first();
  });
}

}  // namespace emulator
