// Many rows through AMX tiles. No format here, and no instruction: `Tiles` is simd/amx.h's.
//
// Activations of a chunk of inputs are brought once into tiles of 16 rows x 64 bytes, 1 MB of them
// at most, which stays in L2. Then, for every panel of 32 outputs and every 16 k-tiles of it
// (32 KB of weights, in L1), blocks of 32 rows go by, 2 x 2 tiles of sums each:
//   - weights that lie in the packed bytes as tiles (16 blocks of 64 bytes are one) are loaded from
//     where they are; all others are expanded once into 32 KB and used for all rows;
//   - sums of floats, and of formats with one scale per row, stay in tile registers for 16 k-tiles;
//   - where groups have scales, every group is a step of its own: its exact int32 tile is stored
//   and
//     added in float, in the order that the format states.
// Sums wait in scratch between the k-tiles of a panel, in y (or scratch, if y is to be added to)
// between chunks.
#pragma once

#include "drivers/amx_block.h"
#include "drivers/arithmetic.h"
#include "drivers/output.h"
#include "formats/traits.h"

namespace lacewing {
namespace {

inline constexpr int64_t kAmxDepth = 16;      // k-tiles of weights at once
inline constexpr int64_t kAmxStrips = 1024;   // strips whose cursors are in scratch at once
inline constexpr int64_t kKept = 200 * 1024;  // sums that are in scratch between chunks

// One scale per output instead of one per group.
template <class F>
constexpr bool has_row_scale() {
  if constexpr (requires { F::kRowScale; }) return F::kRowScale;
  return false;
}

// Whether the tiles of a strip lie in its bytes just as they are multiplied: values of 16 bits, or
// codes of 8 whose groups have no scales.
template <class F>
constexpr bool lies_in_tiles() {
  if constexpr (F::kSparse) return false;
  if constexpr (F::kGroup == 0) return F::kTileBytes[0] == F::kPad * kStrip * 2;
  return has_row_scale<F>() && F::kTileBytes[0] == F::kPad * kStrip;
}
template <class F>
inline constexpr bool kLiesInTiles = lies_in_tiles<F>();

// The strip's tiles, one after another.
template <class F>
const uint8_t* tiles_of(const PackedTensor& w, int64_t strip) {
  const auto c = F::open(w, strip);
  if constexpr (F::kGroup == 0)
    return c.values;
  else
    return c.codes;
}

// Formats that this driver can multiply by: floats, and groups that are half a k-tile or whole
// ones.
template <class F>
inline constexpr bool kThroughTiles =
    F::kGroup == 0 || F::kGroup == 32 || (F::kGroup % 64 == 0 && F::kGroup <= kAmxDepth * 64);

// The caller's scratch, cut up.
template <class F>
struct AmxScratch {
  // [16 rows][strip] of a block of rows. Where sums are integers these are their bits.
  using Sums = float[2][2][16][16];

  alignas(64) uint8_t a[kAmxTiles][kTileBytes];        // 1 MB
  alignas(64) uint8_t b[2][kAmxDepth][kTileBytes];     // 32 KB
  alignas(64) Sums sums[kAmxRows / kBlockRows];        // 64 KB
  alignas(64) Sums dots[2];                            // int32, of this step and the one before
  alignas(64) float scales[2][kAmxDepth * 2][kStrip];  // of the weights in `b`
  alignas(64) float minima[2][kAmxDepth * 2][kStrip];
  alignas(64) float kept[kKept];  // 800 KB
  typename F::Cursor cursors[kAmxStrips];
};

template <class S, class Tiles, class F>
class AmxGemm {
 public:
  explicit AmxGemm(const LinearArgs& a) : a_(a), s_(*static_cast<AmxScratch<F>*>(a.scratch)) {
    static_assert(sizeof(AmxScratch<F>) <= kLinearScratch);
  }

  // The shapes are loaded by every call and let go at its end, so that it does not matter what
  // anybody else in this thread does with tiles, and so that no tile is live afterwards: live ones
  // are 8 KB more for the kernel to save at every switch of threads. Both together take about a
  // hundred cycles; one k-tile of one block of rows takes 66.
  void run() {
    tiles_.configure(block_shapes(kStepBytes));
    const int64_t m = a_.x->m, deep = chunk_tiles(kAmxRows < m ? kAmxRows : m);
    tiles_k_ = (a_.x->k_pad + kInputs - 1) / kInputs;
    // Sums that wait in scratch need it: with half the rows, activations are packed half as often.
    const int64_t rows = a_.accumulate && tiles_k_ > deep ? kAmxRows / 2 : kAmxRows;
    for (int64_t r = 0; r < m; r += rows) {
      first_ = r;
      rows_ = rows < m - r ? rows : m - r;
      run_rows();
    }
    tiles_.release();
  }

 private:
  static constexpr int64_t kInputs = kTileInputs<F>;
  static constexpr int64_t kGroupTiles = F::kGroup > 64 ? F::kGroup / 64 : 1;
  static constexpr int64_t kDepth = kAmxDepth / kGroupTiles * kGroupTiles;  // whole groups
  static constexpr bool kFloats = F::kGroup == 0, kRowScale = has_row_scale<F>();
  static constexpr int64_t kStepBytes = F::kGroup == 32 && !kRowScale ? 32 : 64;  // of a row of A

  // Where the packed bytes are the tiles, codes are unsigned; expanded ones are less their zero
  // point.
  static constexpr TileDot kDot = kFloats           ? TileDot::bf16
                                  : kLiesInTiles<F> ? TileDot::s8_u8
                                                    : TileDot::s8_s8;
  template <int RowTiles, int Strips>
  using Block = TileBlock<Tiles, kDot, RowTiles, Strips>;

  // Up to 16 k-tiles of a panel.
  struct Part {
    int64_t s, d, depth;  // first strip; first k-tile in the chunk and how many
    bool waited;          // the sums so far wait where the last chunk left them
    bool leaves;          // the chunk ends here
    bool ends;            // the sums end here
  };

  struct Weights {
    const uint8_t* tiles[2];  // of each strip
    const uint8_t* next[2];   // what will be read after them, or null
  };

  // ---- rows, chunks of inputs, panels of outputs

  // K-tiles of so many rows that fit into the packed activations.
  static int64_t chunk_tiles(int64_t rows) {
    return kAmxTiles / (2 * ((rows + kBlockRows - 1) / kBlockRows)) / kDepth * kDepth;
  }

  void run_rows() {
    blocks_ = (rows_ + kBlockRows - 1) / kBlockRows;
    const int64_t fit = chunk_tiles(rows_), chunks = (tiles_k_ + fit - 1) / fit;
    const int64_t step = round_up((tiles_k_ + chunks - 1) / chunks, kDepth);
    in_kept_ = a_.accumulate && chunks > 1;
    kept_strips_ = kKept / (blocks_ * kBlockRows * kStrip);
    const int64_t strips = in_kept_ && kept_strips_ < kAmxStrips ? kept_strips_ : kAmxStrips;
    for (int64_t s = a_.strip_begin; s < a_.strip_end; s += strips)
      run_strips(s, s + strips < a_.strip_end ? s + strips : a_.strip_end, step);
  }

  void run_strips(int64_t begin, int64_t end, int64_t step) {
    begin_ = begin;
    end_ = end;
    for (int64_t s = begin; s < end; ++s) s_.cursors[s - begin] = F::open(*a_.w, s);
    for (k_ = 0; k_ < tiles_k_; k_ += step) {
      count_ = step < tiles_k_ - k_ ? step : tiles_k_ - k_;
      pack_rows<S, F>(s_.a, *a_.x, first_, rows_, k_, count_);
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
    for (int64_t d = 0; d < count_; d += kDepth) {
      const int64_t depth = kDepth < count_ - d ? kDepth : count_ - d;
      const Part part{
          s, d, depth, d == 0 && k_ > 0, d + depth == count_, k_ + d + depth == tiles_k_};
      const Weights w = weights<Strips>(s, d, depth);
      for (int64_t block = 0; block < blocks_; ++block) {
        if (rows_ - block * kBlockRows > 16)
          run_block<2, Strips>(block, part, w);
        else
          run_block<1, Strips>(block, part, w);
      }
    }
  }

  // ---- a block of rows, and where its sums come from and go to

  template <int RowTiles, int Strips>
  void run_block(int64_t block, const Part& part, const Weights& w) {
    const TilePlace here = in_scratch(block), there = waiting(block, part.s);
    // Whole tiles come and go without a stop in scratch, results of floats into y itself.
    const bool whole = in_kept_ || (rows_ - block * kBlockRows >= 16 * RowTiles &&
                                    a_.w->n >= (part.s + Strips) * kStrip);
    const bool straight = whole && (!part.ends || (kFloats && !a_.bias && !a_.accumulate));
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

  TilePlace in_scratch(int64_t block) { return {s_.sums[block][0][0][0], 16, 2 * 256, 256}; }

  // Between chunks: y, or scratch if y is to be added to.
  TilePlace waiting(int64_t block, int64_t s) {
    const int64_t row = block * kBlockRows;
    if (in_kept_) {
      const int64_t stride = kept_strips_ * kStrip;
      return {s_.kept + row * stride + (s - begin_) * kStrip, stride, 16 * stride, kStrip};
    }
    return {a_.y + (first_ + row) * a_.ldy + s * kStrip, a_.ldy, 16 * a_.ldy, kStrip};
  }

  // f(place in y, place in scratch, how many of 16 outputs there are) for what there is of a block.
  template <int Strips, class Copy>
  void copy_waiting(int64_t block, int64_t s, Copy copy) {
    const TilePlace here = in_scratch(block), there = waiting(block, s);
    for (int64_t r = 0; r < kBlockRows && block * kBlockRows + r < rows_; ++r)
      for (int i = 0; i < Strips; ++i)
        copy(there.row(r, i), here.row(r, i), a_.w->n - (s + i) * kStrip);
  }

  template <int Strips>
  void write_block(int64_t block, int64_t s) {
    const TilePlace here = in_scratch(block);
    for (int64_t r = 0; r < kBlockRows && block * kBlockRows + r < rows_; ++r) {
      const int64_t row = first_ + block * kBlockRows + r;
      for (int i = 0; i < Strips; ++i)
        write_outputs<S>(a_, s + i, row, output(s + i, row, here.row(r, i)));
    }
  }

  typename S::F32x16 output(int64_t strip, int64_t row, const float* sums) const {
    if constexpr (!kRowScale) {
      return S::load(sums);
    } else {
      const Rows& x = *a_.x;
      const int32_t zero = kLiesInTiles<F> ? -F::kZeroPoint * x.sum[row] : 0;
      return scale_row<S, F>(S::add_i32(S::bits_i32(S::load(sums)), S::set1_i32(zero)),
                             F::template scale<S>(F::open(*a_.w, strip)), x.scale[row]);
    }
  }

  // ---- weights

  template <int Strips>
  Weights weights(int64_t s, int64_t d, int64_t depth) {
    Weights w{{s_.b[0][0], s_.b[1][0]}, {nullptr, nullptr}};
    for (int i = 0; i < Strips; ++i) {
      if constexpr (kLiesInTiles<F>) {
        const uint8_t* strip = tiles_of<F>(*a_.w, s + i);
        const uint8_t* tiles = strip + (k_ + d) * kTileBytes;
        const uint8_t* end = strip + a_.x->k_pad * kTileBytes / kInputs;
        if (end - tiles <
            depth * kTileBytes)  // the last one is cut short: what follows is not ours
          copy_padded(s_.b[i][0], tiles, end - tiles, depth * kTileBytes);
        else
          w.tiles[i] = tiles;
        w.next[i] = d + depth < count_ ? tiles + depth * kTileBytes
                    : s + 2 + i < end_ ? tiles_of<F>(*a_.w, s + 2 + i) + k_ * kTileBytes
                                       : nullptr;
      } else if constexpr (kFloats) {
        expand_floats(i, s_.cursors[s + i - begin_], d, depth);
      } else {
        expand(i, s_.cursors[s + i - begin_], groups_in(d, depth));
      }
    }
    return w;
  }

  // Inputs in `depth` k-tiles from the chunk's d-th one.
  int64_t inputs_in(int64_t d, int64_t depth) const {
    const int64_t left = a_.x->k_pad - (k_ + d) * kInputs, inputs = depth * kInputs;
    return inputs < left ? inputs : left;
  }
  int64_t groups_in(int64_t d, int64_t depth) const { return inputs_in(d, depth) / F::kGroup; }

  static void copy_padded(uint8_t* to, const uint8_t* from, int64_t bytes, int64_t room) {
    __builtin_memcpy(to, from, static_cast<size_t>(bytes));
    __builtin_memset(to + bytes, 0, static_cast<size_t>(room - bytes));
  }

  // Codes less their zero point, which fit a signed byte: no correction by the sums of q is due.
  void expand(int i, typename F::Cursor& c, int64_t groups) {
    static_assert(F::kMaxCode - F::kZeroPoint < 128);
    uint8_t* p = s_.b[i][0];
    for (int64_t g = 0; g < groups; ++g) {
      if constexpr (!kRowScale) S::store(s_.scales[i][g], F::template scale<S>(c));
      if constexpr (F::kHasMin) S::store(s_.minima[i][g], F::template minimum<S>(c));
      F::template group<S>(
          c, [&](int b, typename S::U8x64 v) __attribute__((always_inline)) {
            S::store_u8(p + 64 * b, S::sub_u8(v, F::kZeroPoint));
          });
      p += F::kGroup * kStrip;
    }
  }

  void expand_floats(int i, typename F::Cursor& c, int64_t d, int64_t depth) {
    const int64_t pairs = inputs_in(d, depth) / 2;
    uint8_t* p = s_.b[i][0];
    for (int64_t j = 0; j < pairs; ++j) {
      typename S::F32x16 even, odd;
      F::template pair<S>(c, even, odd);
      S::store_u8(p + 64 * j, S::join_bf16(even, odd));
    }
    __builtin_memset(p + 64 * pairs, 0, static_cast<size_t>(depth * kTileBytes - 64 * pairs));
  }

  // ---- multiplying: from the sums at `from` to those at `to`

  template <int RowTiles, int Strips>
  void multiply(int64_t block, const Part& part, const Weights& w, const TilePlace& from,
                const TilePlace& to) {
    const uint8_t* a = s_.a[2 * (block * count_ + part.d)];
    if constexpr (kFloats || kRowScale)
      multiply_long<RowTiles, Strips>(a, block, part, w, from, to);
    else
      multiply_groups<RowTiles, Strips>(a, block, part, from, to);
  }

  // Sums that stay in registers.
  template <int RowTiles, int Strips>
  void multiply_long(const uint8_t* a, int64_t block, const Part& part, const Weights& w,
                     const TilePlace& from, const TilePlace& to) {
    const Block<RowTiles, Strips> sums{tiles_};
    k_ + part.d == 0 ? sums.zero() : sums.load(from);
    for (int64_t t = 0; t < part.depth; ++t) {
      sums.step(a + 2 * kTileBytes * t, w.tiles[0] + kTileBytes * t, w.tiles[1] + kTileBytes * t);
      prefetch_block(from, to, t);
      prefetch_weights(w, block * kAmxDepth + t);
    }
    sums.store(to);
  }

  // Sums of one group at a time. Tile instructions of one group run beside the float steps of the
  // group before.
  template <int RowTiles, int Strips>
  void multiply_groups(const uint8_t* a, int64_t block, const Part& part, const TilePlace& from,
                       const TilePlace& to) {
    const TilePlace here = in_scratch(block);
    if (k_ + part.d == 0) __builtin_memset(here.p, 0, sizeof(s_.sums[0]));
    const int64_t groups = groups_in(part.d, part.depth);
    const int64_t first = (k_ + part.d) * kInputs / F::kGroup;
    const Block<RowTiles, Strips> sums{tiles_};
    for (int64_t g = 0; g < groups; ++g) {
      sums.zero();
      for (int64_t at = g * F::kGroup; at < (g + 1) * F::kGroup; at += kStepBytes)
        sums.step(a + at / 64 * 2 * kTileBytes + at % 64, s_.b[0][0] + at * kStrip,
                  s_.b[1][0] + at * kStrip);
      sums.store(dots(g));
      if (g > 1)
        add_dots<Strips, true>(block, first, g - 1, here, here);
      else if (g > 0)
        add_dots<Strips, false>(block, first, 0, from, here);
    }
    add_dots<Strips, false>(block, first, groups - 1, groups == 1 ? from : here, to);
  }

  // The integer sums of group g.
  TilePlace dots(int64_t g) { return {s_.dots[g % 2][0][0][0], 16, 2 * 256, 256}; }

  // The exact sums of group `first` + g: rows of the block that there are. InScratch: from there
  // and to there, with strides that the compiler then knows (15 % of the time of these steps).
  template <int Strips, bool InScratch>
  void add_dots(int64_t block, int64_t first, int64_t g, const TilePlace& from,
                const TilePlace& to) {
    const Rows& x = *a_.x;
    const TilePlace dot = dots(g);
    const int64_t all = x.k_pad / F::kGroup, end = rows_ - block * kBlockRows;
    for (int64_t r = 0; r < kBlockRows && r < end; r += kRowBlock) {
      const int64_t row = first_ + block * kBlockRows + r;
      const int lanes = x.rows_in(row / kRowBlock);
      const float* sx = x.scale + row * all + (first + g) * lanes;
      const int32_t* sumx = x.sum + row * all + (first + g) * lanes;
      for (int i = 0; i < Strips; ++i) {
        const auto sw = S::load(s_.scales[i][g]);
        auto mw = sw;
        if constexpr (F::kHasMin) mw = S::load(s_.minima[i][g]);
        const float *p = from.row(r, i), *d = dot.row(r, i);
        float* q = to.row(r, i);
        const int64_t p_stride = InScratch ? 16 : from.stride,
                      q_stride = InScratch ? 16 : to.stride;
        const auto add = [&](int lane) __attribute__((always_inline)) {
          S::store(q + lane * q_stride, add_group<S, F>(S::load(p + lane * p_stride),
                                                        S::bits_i32(S::load(d + lane * 16)), sw, mw,
                                                        sx[lane], sumx[lane]));
        };
        if (lanes == kRowBlock) {
#pragma GCC unroll 8
          for (int lane = 0; lane < kRowBlock; ++lane) add(lane);
        } else {
          for (int lane = 0; lane < lanes; ++lane) add(lane);
        }
      }
    }
  }

  // A sixteenth of the sums of the next block to L1: two rows of both strips, where they come from
  // and where they will go.
  static LW_INLINE void prefetch_block(const TilePlace& from, const TilePlace& to, int64_t step) {
    for (int64_t r = kBlockRows + 2 * step; r < kBlockRows + 2 * step + 2; ++r) {
      S::prefetch_t0(from.row(r, 0));
      S::prefetch_t0(from.row(r, 1));
      if (to.p == from.p) continue;
      S::prefetch_t0(to.row(r, 0));
      S::prefetch_t0(to.row(r, 1));
    }
  }

  // The next 16 KB of each strip to L2, shared out over all steps of all blocks of rows.
  LW_INLINE void prefetch_weights(const Weights& w, int64_t step) {
    if (!w.next[0]) return;
    const int64_t bytes = (kAmxDepth + blocks_ - 1) / blocks_ * 64;
    for (int64_t at = step * bytes; at < (step + 1) * bytes && at < kAmxDepth * kTileBytes;
         at += 64) {
      S::prefetch_t1(w.next[0] + at);
      if (w.next[1]) S::prefetch_t1(w.next[1] + at);
    }
  }

  const LinearArgs& a_;
  AmxScratch<F>& s_;
  Tiles tiles_;
  int64_t first_ = 0, rows_ = 0, blocks_ = 0;  // rows of this panel, and their blocks of 32
  int64_t kept_strips_ = 0;                    // as many strips' sums fit into scratch
  int64_t begin_ = 0, end_ = 0;                // strips whose cursors are in scratch
  int64_t tiles_k_ = 0;                        // k-tiles in all
  int64_t k_ = 0, count_ = 0;                  // k-tiles of this chunk
  bool in_kept_ = false;                       // where sums wait between chunks: there, or y
};

}  // namespace
}  // namespace lacewing
