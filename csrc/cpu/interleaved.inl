// The usual order of a tile's codes: (group, padded_group / 4, token, 4).
// Included by implementations in their own namespace, after `eight_for_tile`, which orders eight codes among themselves.

inline void place_interleaved(const int8_t* codes, int padded_group, uint8_t* group, int i, int T) {
  uint8_t* at = group + 4 * i;
  for (int k = 0; k < padded_group; k += 8, at += 8 * T) {
    uint64_t eight;
    std::memcpy(&eight, codes + k, 8);
    eight = eight_for_tile(eight);
    const uint32_t low = static_cast<uint32_t>(eight), high = static_cast<uint32_t>(eight >> 32);
    std::memcpy(at, &low, 4);
    std::memcpy(at + 4 * T, &high, 4);
  }
}

inline void lay_out_interleaved(Tiles& tiles, int tile) {
  tiles.tile = tile;
  tiles.padded_group = (tiles.group_size + kChunk - 1) / kChunk * kChunk;
  tiles.group_bytes = tiles.padded_group;
  tiles.wide = false;
}
