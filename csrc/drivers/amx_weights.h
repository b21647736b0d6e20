// Weights of one or two strips as AMX multiplies them: where they lie, or expanded into scratch.
#pragma once

#include "drivers/amx_chunk.h"

namespace lacewing {
namespace {

struct AmxWeights {
  const uint8_t* tiles[2];  // of each strip
  const uint8_t* next[2];   // what will be read after them, or null
};

// The strip's tiles, one after another.
template <class F>
const uint8_t* tiles_of(const PackedTensor& w, int64_t strip) {
  const auto c = F::open(w, strip);
  if constexpr (F::kGroup == 0)
    return c.values;
  else
    return c.codes;
}

// `depth` k-tiles from the chunk's d-th one, where they lie; strip i of the panel. The last one of
// a strip may be cut short: what follows is not ours, and the rest of the tile is zeros.
template <class F>
void find_weights(AmxWeights& w, int i, const AmxChunk<F>& c, int64_t strip, int64_t d,
                  int64_t depth) {
  const uint8_t* all = tiles_of<F>(*c.a.w, strip);
  const uint8_t* tiles = all + (c.k + d) * kTileBytes;
  const int64_t left = all + c.a.x->k_pad * kTileBytes / kTileInputs<F> - tiles;
  const int64_t bytes = depth * kTileBytes;
  if (left < bytes) {
    __builtin_memcpy(c.s.b[i][0], tiles, static_cast<size_t>(left));
    __builtin_memset(c.s.b[i][0] + left, 0, static_cast<size_t>(bytes - left));
  } else {
    w.tiles[i] = tiles;
  }
  w.next[i] = d + depth < c.count ? tiles + bytes
              : strip + 2 < c.end ? tiles_of<F>(*c.a.w, strip + 2) + c.k * kTileBytes
                                  : nullptr;
}

// Codes less their zero point, which fit a signed byte: no correction by the sums of q is due.
template <class S, class F>
void expand_codes(AmxScratch<F>& s, int i, typename F::Cursor& c, int64_t groups) {
  static_assert(F::kMaxCode - F::kZeroPoint < 128);
  uint8_t* p = s.b[i][0];
  for (int64_t g = 0; g < groups; ++g) {
    if constexpr (!F::kRowScale) S::store(s.scales[i][g], F::template scale<S>(c));
    if constexpr (F::kHasMin) S::store(s.minima[i][g], F::template minimum<S>(c));
    F::template group<S>(
        c, [&](int b, typename S::U8x64 v) __attribute__((always_inline)) {
          S::store_u8(p + 64 * b, S::sub_u8(v, F::kZeroPoint));
        });
    p += F::kGroup * kStrip;
  }
}

template <class S, class F>
void expand_floats(uint8_t* p, typename F::Cursor& c, int64_t pairs, int64_t depth) {
  for (int64_t j = 0; j < pairs; ++j) {
    typename S::F32x16 even, odd;
    F::template pair<S>(c, even, odd);
    S::store_u8(p + 64 * j, S::join_bf16(even, odd));
  }
  __builtin_memset(p + 64 * pairs, 0, static_cast<size_t>(depth * kTileBytes - 64 * pairs));
}

// Strips s.. (one or two) times `depth` k-tiles from the chunk's d-th one.
template <class S, class F, int Strips>
AmxWeights take_weights(const AmxChunk<F>& c, int64_t s, int64_t d, int64_t depth) {
  AmxWeights w{{c.s.b[0][0], c.s.b[1][0]}, {nullptr, nullptr}};
  for (int i = 0; i < Strips; ++i) {
    auto& cursor = c.s.cursors[s + i - c.begin];
    if constexpr (kLiesInTiles<F>)
      find_weights(w, i, c, s + i, d, depth);
    else if constexpr (F::kGroup == 0)
      expand_floats<S, F>(c.s.b[i][0], cursor, c.inputs_in(d, depth) / 2, depth);
    else
      expand_codes<S>(c.s, i, cursor, c.groups_in(d, depth));
  }
  return w;
}

}  // namespace
}  // namespace lacewing
