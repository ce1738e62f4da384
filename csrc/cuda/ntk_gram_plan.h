// Host side of the fast versions of ntk_gram, beside plan_gram of plans.h: plain C++, tested without a
// GPU. Everything here follows from sizes alone, so that results do not depend on the device.
#pragma once

#include "cuda/plans.h"

namespace catapult::cuda {

constexpr int kNominalProcessors = 132;  // multiprocessors that a plan is made for: those of an H100 or H200
constexpr int kLargeTile = 128;          // side of the tiles of large kernels; the others have kTile
constexpr int64_t kNarrow = 4;     // products of so few columns are formed element by element, without tiles
constexpr int kClusterBlocks = 8;  // blocks that share the columns of one part of a product
constexpr int64_t kPartChunk = 128;  // columns of a part are a multiple of this

// Time of one multiprocessor that gets the most tiles. A tile of kLargeTile has four times the work of one
// of kTile, but needs half the traffic for it: small tiles count 5 / 4 of their work.
constexpr int64_t tile_cost(int64_t tiles, int side) {
  return ceil_div(tiles, kNominalProcessors) * (side == kLargeTile ? 16 : 5);
}

struct FastGramPlan {
  int side;       // of a tile
  GramPlan gram;  // for tiles of that side; parts only for kTile, none for narrow products
};

// `large_tiles`: whether there is a kernel for kLargeTile; `cluster`: blocks that work on one part.
inline FastGramPlan plan_gram_fast(int64_t rows, int64_t columns, bool symmetric, const int64_t* a_columns,
                                   const int64_t* b_columns, int num_terms, bool large_tiles, int cluster) {
  auto cut = [&](int side) {
    GramPlan plan{};
    plan.row_tiles = ceil_div(rows, side);
    plan.column_tiles = ceil_div(columns, side);
    plan.tiles = symmetric ? triangle(plan.row_tiles) : plan.row_tiles * plan.column_tiles;
    return plan;
  };
  FastGramPlan plan{kTile, cut(kTile)};
  const GramPlan large = cut(kLargeTile);
  if (large_tiles && tile_cost(large.tiles, kLargeTile) < tile_cost(plan.gram.tiles, kTile))
    return {kLargeTile, large};

  auto depth = [&](int product) {
    const int64_t own = product % 2 == 0 ? a_columns[product / 2] : b_columns[product / 2];
    return own <= kNarrow ? 0 : own;
  };
  int64_t chunks = 0;
  for (int i = 0; i < 2 * num_terms; ++i) chunks += ceil_div(depth(i), kPartChunk);
  GramPlan& gram = plan.gram;
  gram.split = gram.tiles > 0 && gram.tiles < kNominalProcessors && chunks > 1;
  if (!gram.split) return plan;
  const int64_t chunks_per_part = ceil_div(chunks * gram.tiles, 2 * kNominalProcessors / cluster);
  for (int i = 0; i < 2 * num_terms; ++i) {
    gram.columns_per_part[i] = chunks_per_part * kPartChunk;
    gram.first_part[i + 1] = gram.first_part[i] + ceil_div(depth(i), gram.columns_per_part[i]);
  }
  return plan;
}

}  // namespace catapult::cuda
