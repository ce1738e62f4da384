// Host side of the fast versions of jacobian_conv2d, beside plans.h: plain C++, tested without a GPU.
// Everything follows from sizes alone.
#pragma once

#include "cuda/ntk_gram_plan.h"

namespace catapult::cuda {

constexpr int64_t kPartBlocks = 4 * kNominalProcessors;  // that work on G G^T at a time
constexpr int64_t kLeastPart = 128;                      // columns of a part

// A weight [groups rows, taps] is swept in tiles, whose gradients of all samples are in memory at a time:
// some rows and taps of one group, or some whole groups.
struct GradientSweep {
  int64_t samples;      // n c
  int64_t rows, taps;   // of a group
  int64_t tile_groups;  // more than one only with all of their rows and taps
  int64_t tile_rows, tile_taps;
  int64_t columns() const { return tile_groups * tile_rows * tile_taps; }  // of a full tile
};

// Tiles hold at most tile_bytes of gradients, or as many weights as one row has taps. Sides of kTile or
// more let the blocks be full; beyond kLargeTile rows, more taps are worth more.
inline GradientSweep plan_gradient_sweep(int64_t samples, int64_t groups, int64_t rows, int64_t taps,
                                         int64_t item_bytes, int64_t tile_bytes) {
  GradientSweep sweep{samples, rows, taps, 1, rows, taps};
  const int64_t weights = std::max(taps, tile_bytes / (samples * item_bytes));
  if (weights >= rows * taps) {
    sweep.tile_groups = std::min(groups, weights / (rows * taps));
    return sweep;
  }
  auto whole_sides = [](int64_t size) { return size < kTile ? size : size / kTile * kTile; };
  const int64_t side = weights < kLargeTile * kLargeTile ? kTile : kLargeTile;
  sweep.tile_rows = std::min({rows, side, std::max<int64_t>(1, weights / std::min<int64_t>(taps, kTile))});
  sweep.tile_taps = weights / sweep.tile_rows;
  if (sweep.tile_taps < taps) {
    sweep.tile_taps = whole_sides(sweep.tile_taps);
  } else {
    sweep.tile_taps = taps;
    sweep.tile_rows = whole_sides(std::min(rows, weights / taps));
  }
  return sweep;
}

// Side of the blocks that make the gradients of a tile.
inline int gradient_side(const GradientSweep& sweep, int64_t rows, int64_t taps, bool large_tiles) {
  auto cost = [&](int side) {
    return tile_cost(sweep.samples * sweep.tile_groups * ceil_div(rows, side) * ceil_div(taps, side), side);
  };
  return large_tiles && cost(kLargeTile) < cost(kTile) ? kLargeTile : kTile;
}

// K += G G^T of every tile. With few tiles of K, the columns of G are cut into parts; each part keeps a sum
// of its own over the whole sweep, and the last launch adds them up.
struct AccumulatePlan {
  int side;
  int64_t tiles;  // of the lower triangle of K
  int64_t parts;  // 1: straight into K

  // Of a part, where a tile of G has `columns`.
  int64_t columns_per_part(int64_t columns) const {
    return parts == 1 ? columns : ceil_div(ceil_div(columns, parts), 16) * 16;
  }
  int64_t partial_elements() const { return parts == 1 ? 0 : parts * tiles * side * side; }
};

inline AccumulatePlan plan_accumulate(const GradientSweep& sweep, bool large_tiles) {
  auto tiles = [&](int side) { return triangle(ceil_div(sweep.samples, side)); };
  if (large_tiles && tile_cost(tiles(kLargeTile), kLargeTile) < tile_cost(tiles(kTile), kTile))
    return {kLargeTile, tiles(kLargeTile), 1};
  AccumulatePlan plan{kTile, tiles(kTile), 1};
  if (plan.tiles < kNominalProcessors)
    plan.parts = std::clamp<int64_t>(sweep.columns() / kLeastPart, 1, kPartBlocks / plan.tiles);
  return plan;
}

}  // namespace catapult::cuda
