// The usual order of a tile's codes: (group, padded_group / 4, token, 4).
// Included by implementations in their own namespace.

inline void lay_out_interleaved(Tiles& tiles, int tile) {
  tiles.tile = tile;
  tiles.padded_group = (tiles.group_size + kChunk - 1) / kChunk * kChunk;
  tiles.group_bytes = tiles.padded_group;
  tiles.wide = false;
}

inline void place_interleaved(const int8_t (*codes)[kMostGroup], const Tiles& tiles, uint8_t* group, int T) {
  for (int k = 0; k < tiles.padded_group; k += 4) {
    for (int i = 0; i < T; i++, group += 4) std::memcpy(group, codes[i] + k, 4);
  }
}
