// How the product is cut into pieces and dealt out to blocks: arithmetic only, the same on host, device and in tests.
//
// A piece is some rows by some tokens, over all G groups of inputs. With one piece of tokens every block gets an equal
// share of all groups of all pieces, wherever that begins and ends; pieces are then shared by neighbours. With several,
// most pieces are dealt out whole, in turn, so that blocks that run at one time read the same rows and tokens; the rest is
// shared as above. A block takes its share from the back: what it leaves to its successor comes first, so the block that
// finishes a piece, the last of those that share it, finds the sums of the others ready.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TORCHMIX_BOTH __host__ __device__ __forceinline__
#else
#define TORCHMIX_BOTH inline
#endif

namespace torchmix {

constexpr int kPiecesTogether = 8;  // pieces of tokens that go through all rows together

// A part of a piece: groups first .. last - 1.
struct Part {
  int rows, tokens;  // numbers of the piece's rows and of its tokens
  int first, last;
  int shared;  // number of the piece among the shared ones, -1: it is this block's alone
};

// Blocks are clusters here, where there are any.
struct Schedule {
  int row_pieces, token_pieces, groups, blocks;
  int wide_shift;    // a group of more than 4 bits takes as long as 1 << this of the others
  int whole;         // pieces that every block has for itself
  int heavy;         // cost of the shared pieces above 4 bits, which come first
  int share, extra;  // cost of every block's share, and how many blocks have 1 more

  // wide: pieces of rows above 4 bits.
  TORCHMIX_BOTH Schedule(int row_pieces, int token_pieces, int groups, int blocks, int wide, int wide_shift)
      : row_pieces(row_pieces), token_pieces(token_pieces), groups(groups), blocks(blocks), wide_shift(wide_shift) {
    const int pieces = row_pieces * token_pieces, rounds = pieces / blocks;
    whole = token_pieces == 1 ? 0 : pieces == rounds * blocks ? rounds : rounds > 1 ? rounds - 1 : 0;
    heavy = token_pieces > 1 ? 0 : (wide * groups) << wide_shift;
    const int cost = heavy + (shared_pieces() - (heavy > 0 ? wide : 0)) * groups;
    share = cost / blocks;
    extra = cost - share * blocks;
  }

  TORCHMIX_BOTH int shared_pieces() const { return row_pieces * token_pieces - whole * blocks; }

  // Where the share of a block begins: groups of all shared pieces before it.
  TORCHMIX_BOTH int begin(int block) const {
    const int at = block * share + (block < extra ? block : extra);
    return at < heavy ? at >> wide_shift : (heavy >> wide_shift) + (at - heavy);
  }

  // The nearest block before `block` that has a part of this shared piece, or -1.
  TORCHMIX_BOTH int sharer_before(int block, int shared) const {
    for (int other = block - 1; other >= 0 && begin(other + 1) > shared * groups; other--) {
      if (begin(other) < begin(other + 1)) return other;
    }
    return -1;
  }
};

// The parts of one block, one after another.
struct Parts {
  const Schedule& schedule;
  int block, from, to, piece, lowest, whole;

  TORCHMIX_BOTH Parts(const Schedule& schedule, int block)
      : schedule(schedule), block(block), from(schedule.begin(block)), to(schedule.begin(block + 1)), whole(0) {
    lowest = from / schedule.groups;
    piece = to > from ? (to - 1) / schedule.groups : lowest - 1;  // the next one, down to the lowest
  }

  // False: there are no more.
  TORCHMIX_BOTH bool next(Part& part) {
    const int groups = schedule.groups;
    part.first = 0;
    part.last = groups;
    part.shared = -1;
    if (piece >= lowest) {
      const int start = piece * groups;
      if (from > start) part.first = from - start;
      if (to < start + groups) part.last = to - start;
      if (part.first > 0 || part.last < groups) part.shared = piece;
      place(part, piece--);
      return true;
    }
    if (whole == schedule.whole) return false;
    place(part, schedule.shared_pieces() + whole++ * schedule.blocks + block);
    return true;
  }

  TORCHMIX_BOTH void place(Part& part, int number) const {
    part.rows = number;
    part.tokens = 0;
    if (schedule.token_pieces == 1) return;
    const int band = number / (kPiecesTogether * schedule.row_pieces);
    const int left = schedule.token_pieces - band * kPiecesTogether;
    const int in_band = left < kPiecesTogether ? left : kPiecesTogether;
    const int inside = number - band * kPiecesTogether * schedule.row_pieces;
    part.rows = inside / in_band;
    part.tokens = band * kPiecesTogether + inside - part.rows * in_band;
  }
};

}  // namespace torchmix
