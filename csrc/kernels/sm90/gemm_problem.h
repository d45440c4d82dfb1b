// A grouped product as its kernel reads it.
#pragma once
#include <cuda.h>
#include <cutlass/fast_math.h>

#include <cstdint>

#include "../params.h"

namespace nvfp4::sm90 {

constexpr int64_t kMostExperts = 1536;  // a table of all is in shared memory

struct Problem {
  GemmParams p;
  bool gated;                    // low rows from n, high rows from N/2 + n; else a tile's halves follow
  int32_t tile_step, half_step;  // weight rows from a tile to the next, from its low half to its high one
  int32_t row_tiles;             // tiles of weight rows, by teams
  int32_t team;                  // CTAs of one: a cluster
  int32_t steps;                 // ceil(K / 64): of the MMAs, and atoms of scales
  int64_t sf_strip, sf_expert;   // bytes of scales of 128 rows, of an expert
  uint32_t* carried;  // [CTAs][Tile::kCarried][consumers]: accumulators of items that two CTAs share
  uint64_t* flags;    // [CTAs][warpgroups]: `launch` where they are there, else anything
  uint64_t launch;    // a number no other launch has
  cutlass::FastDivmod by_teams, by_stages;  // teams in the grid, stages of K
  // Of two products in one launch (pair.cuh):
  uint32_t* finished;  // [token tiles]: tiles of weight rows the first product has finished, of these tokens
  int awaits;          // how many the second one waits for; 0: this is the first, or the only one
};

struct Product {  // with what the copy engine knows of its operands
  Problem problem;
  CUtensorMap weights, tokens;
};

struct Pair {  // the second one's tokens are what the first one puts out
  Product product[2];
};

}  // namespace nvfp4::sm90
