// Many rows through AMX tiles. No format here, and no instruction: `Tiles` is simd/amx.h's.
//
// Activations of a chunk of inputs are brought once into tiles of 16 rows x 64 bytes, 1 MB of them
// at most, which stays in L2. Then, for every panel of 32 outputs and every 16 k-tiles of it
// (32 KB of weights, in L1), blocks of 32 rows go by, 2 x 2 tiles of sums each:
//   - weights that lie in the packed bytes as tiles (16 blocks of 64 bytes are one) are loaded from
//     where they are; all others are expanded once into 32 KB and used for all rows;
//   - sums of floats, and of formats with one scale per row, stay in tile registers for 16 k-tiles;
//   - where groups have scales, every group is a step of its own: its exact int32 tile is stored
//     and added in float, in the order that the format states.
// Sums wait in scratch between the k-tiles of a panel, in y (or scratch, if y is to be added to)
// between chunks.
#pragma once

#include "drivers/amx_group_sums.h"
#include "drivers/amx_long_sums.h"
#include "drivers/output.h"

namespace lacewing {
namespace {

template <class S, class Tiles, class F>
class AmxGemm {
 public:
  explicit AmxGemm(const LinearArgs& a) : a_(a), c_{a, *static_cast<AmxScratch<F>*>(a.scratch)} {
    static_assert(sizeof(AmxScratch<F>) <= kLinearScratch);
  }

  // The shapes are loaded by every call and let go at its end, so that it does not matter what
  // anybody else in this thread does with tiles, and so that no tile is live afterwards: live ones
  // are 8 KB more for the kernel to save at every switch of threads. Both together take about a
  // hundred cycles; one k-tile of one block of rows takes 66.
  void run() {
    tiles_.configure(block_shapes(kStepBytes<F>));
    const int64_t m = a_.x->m, deep = chunk_tiles(kAmxRows < m ? kAmxRows : m);
    tiles_k_ = (a_.x->k_pad + kInputs - 1) / kInputs;
    // Sums that wait in scratch need it: with half the rows, activations are packed half as often.
    const int64_t rows = a_.accumulate && tiles_k_ > deep ? kAmxRows / 2 : kAmxRows;
    for (int64_t r = 0; r < m; r += rows) {
      c_.first = r;
      c_.rows = rows < m - r ? rows : m - r;
      run_rows();
    }
    tiles_.release();
  }

 private:
  static constexpr int64_t kInputs = kTileInputs<F>;
  static constexpr int64_t kGroupTiles = F::kGroup > 64 ? F::kGroup / 64 : 1;
  static constexpr int64_t kDepth = kAmxDepth / kGroupTiles * kGroupTiles;  // whole groups

  // ---- rows, chunks of inputs, panels of outputs

  // K-tiles of so many rows that fit into the packed activations.
  static int64_t chunk_tiles(int64_t rows) {
    return kAmxTiles / (2 * ((rows + kBlockRows - 1) / kBlockRows)) / kDepth * kDepth;
  }

  void run_rows() {
    c_.blocks = (c_.rows + kBlockRows - 1) / kBlockRows;
    const int64_t fit = chunk_tiles(c_.rows), chunks = (tiles_k_ + fit - 1) / fit;
    const int64_t step = round_up((tiles_k_ + chunks - 1) / chunks, kDepth);
    in_kept_ = a_.accumulate && chunks > 1;
    kept_strips_ = kKept / (c_.blocks * kBlockRows * kStrip);
    const int64_t strips = in_kept_ && kept_strips_ < kAmxStrips ? kept_strips_ : kAmxStrips;
    for (int64_t s = a_.strip_begin; s < a_.strip_end; s += strips)
      run_strips(s, s + strips < a_.strip_end ? s + strips : a_.strip_end, step);
  }

  void run_strips(int64_t begin, int64_t end, int64_t step) {
    c_.begin = begin;
    c_.end = end;
    for (int64_t s = begin; s < end; ++s) c_.s.cursors[s - begin] = F::open(*a_.w, s);
    for (c_.k = 0; c_.k < tiles_k_; c_.k += step) {
      c_.count = step < tiles_k_ - c_.k ? step : tiles_k_ - c_.k;
      pack_rows<S, F>(c_.s.a, *a_.x, c_.first, c_.rows, c_.k, c_.count);
      for (int64_t s = begin; s < end; s += 2) {
        if (s + 1 < end)
          run_panel<2>(s);
        else
          run_panel<1>(s);
      }
    }
  }

  // Strips s.. (one or two) times the chunk.
  template <int Strips>
  void run_panel(int64_t s) {
    for (int64_t d = 0; d < c_.count; d += kDepth) {
      const int64_t depth = kDepth < c_.count - d ? kDepth : c_.count - d;
      const AmxPart part{
          s, d, depth, d == 0 && c_.k > 0, d + depth == c_.count, c_.k + d + depth == tiles_k_};
      const AmxWeights w = take_weights<S, F, Strips>(c_, s, d, depth);
      for (int64_t block = 0; block < c_.blocks; ++block) {
        if (c_.rows - block * kBlockRows > 16)
          run_block<2, Strips>(block, part, w);
        else
          run_block<1, Strips>(block, part, w);
      }
    }
  }

  // ---- a block of rows, and where its sums come from and go to

  template <int RowTiles, int Strips>
  void run_block(int64_t block, const AmxPart& part, const AmxWeights& w) {
    const TilePlace here = c_.in_scratch(block), there = waiting(block, part.s);
    // Whole tiles come and go without a stop in scratch, results of floats into y itself.
    const bool whole = in_kept_ || (c_.rows - block * kBlockRows >= 16 * RowTiles &&
                                    a_.w->n >= (part.s + Strips) * kStrip);
    const bool straight = whole && (!part.ends || (F::kGroup == 0 && !a_.bias && !a_.accumulate));
    if (part.waited && !whole)
      copy_waiting<Strips>(block, part.s, [](float* y, float* sum, int64_t n) {
        S::store(sum, n < kStrip ? S::load_n(y, n) : S::load(y));
      });
    multiply<RowTiles, Strips>(block, part, w, part.waited && whole ? there : here,
                               part.leaves && straight ? there : here);
    if (part.ends && !straight)
      write_block<Strips>(block, part.s);
    else if (part.leaves && !straight)
      copy_waiting<Strips>(block, part.s, [](float* y, float* sum, int64_t n) {
        n < kStrip ? S::store_n(y, S::load(sum), n) : S::store(y, S::load(sum));
      });
  }

  // Between chunks: y, or scratch if y is to be added to.
  TilePlace waiting(int64_t block, int64_t s) {
    const int64_t row = block * kBlockRows;
    if (in_kept_) {
      const int64_t stride = kept_strips_ * kStrip;
      return {c_.s.kept + row * stride + (s - c_.begin) * kStrip, stride, 16 * stride, kStrip};
    }
    return {a_.y + (c_.first + row) * a_.ldy + s * kStrip, a_.ldy, 16 * a_.ldy, kStrip};
  }

  // f(place in y, place in scratch, how many of 16 outputs there are) for what there is of a block.
  template <int Strips, class Copy>
  void copy_waiting(int64_t block, int64_t s, Copy copy) {
    const TilePlace here = c_.in_scratch(block), there = waiting(block, s);
    for (int64_t r = 0; r < kBlockRows && block * kBlockRows + r < c_.rows; ++r)
      for (int i = 0; i < Strips; ++i)
        copy(there.row(r, i), here.row(r, i), a_.w->n - (s + i) * kStrip);
  }

  template <int Strips>
  void write_block(int64_t block, int64_t s) {
    const TilePlace here = c_.in_scratch(block);
    for (int64_t r = 0; r < kBlockRows && block * kBlockRows + r < c_.rows; ++r) {
      const int64_t row = c_.first + block * kBlockRows + r;
      for (int i = 0; i < Strips; ++i)
        write_outputs<S>(a_, s + i, row, output(s + i, row, here.row(r, i)));
    }
  }

  typename S::F32x16 output(int64_t strip, int64_t row, const float* sums) const {
    if constexpr (F::kRowScale)
      return finish_row<S, F>(a_, strip, row, sums);
    else
      return S::load(sums);
  }

  // From the sums at `from` to those at `to`.
  template <int RowTiles, int Strips>
  void multiply(int64_t block, const AmxPart& part, const AmxWeights& w, const TilePlace& from,
                const TilePlace& to) {
    const TileBlock<Tiles, kTileDot<F>, RowTiles, Strips> sums{tiles_};
    const uint8_t* x = c_.s.a[2 * (block * c_.count + part.d)];
    if constexpr (kLongSums<F>)
      multiply_long<S>(c_, sums, x, block, part, w, from, to);
    else
      multiply_groups<S, F, Strips>(c_, sums, x, block, part, from, to);
  }

  const LinearArgs& a_;
  AmxChunk<F> c_;
  Tiles tiles_;
  int64_t tiles_k_ = 0;      // k-tiles in all
  int64_t kept_strips_ = 0;  // as many strips' sums fit into scratch
  bool in_kept_ = false;     // where sums wait between chunks: there, or y
};

}  // namespace
}  // namespace lacewing
