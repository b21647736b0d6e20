// Few rows, at most one block of `Rows`: every weight is decoded once for all of them. No format,
// no ISA here.
#pragma once

#include "drivers/arithmetic.h"
#include "drivers/output.h"
#include "formats/traits.h"

namespace lacewing {
namespace {

// Rows [0, R) of the M rows that q, sx and sumx interleave, times one decoded group.
template <class S, class F, int M, int R, class Blocks>
LW_INLINE void gemv_group(typename S::F32x16* acc, typename S::F32x16 sw, typename S::F32x16 mw,
                          const int8_t* q, const float* sx, const int32_t* sumx,
                          const Blocks& blocks) {
  using Dot = typename S::template Dot<F::kZeroPoint, F::kMaxCode>;
  typename Dot::Acc dot[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) dot[r] = Dot::init(sumx[r]);
  blocks([&](int b, typename S::U8x64 w) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) Dot::step(dot[r], w, q + (b * M + r) * 4);
  });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    acc[r] = add_group<S, F>(acc[r], Dot::finish(dot[r], sumx[r]), sw, mw, sx[r], sumx[r]);
}

// Strips that are read side by side: `count` of them, `apart` strips from one to the next. One
// core reads several streams much faster than one where its prefetchers are alone (kGemvStreams
// tells; what is added to an output, and in which order, does not depend on it).
struct Streams {
  int64_t first, apart;
  int count;
};

// One group of M rows at cursor c. More rows than fit the registers (kGemvBlock) are taken in turns
// over the group's blocks, decoded once into L1.
template <class S, class F, int M>
LW_INLINE void gemv_rows(typename S::F32x16* acc, typename F::Cursor& c, const int8_t* q,
                         const float* sx, const int32_t* sumx) {
  constexpr int kFirst = M < S::kGemvBlock ? M : S::kGemvBlock;
  const auto sw = F::template scale<S>(c);
  auto mw = sw;
  if constexpr (F::kHasMin) mw = F::template minimum<S>(c);
  if constexpr (M <= S::kGemvBlock) {
    gemv_group<S, F, M, M>(
        acc, sw, mw, q, sx,
        sumx, [&](auto f) __attribute__((always_inline)) { F::template group<S>(c, f); });
  } else {
    alignas(64) uint8_t codes[F::kGroup / 4][64];
    F::template group<S>(
        c, [&](int b, typename S::U8x64 w)
               __attribute__((always_inline)) { S::store_u8(codes[b], w); });
    const auto decoded = [&](auto f) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int b = 0; b < F::kGroup / 4; ++b) f(b, S::load_u8(codes[b]));
    };
    gemv_group<S, F, M, kFirst>(acc, sw, mw, q, sx, sumx, decoded);
    gemv_group<S, F, M, M - kFirst>(acc + kFirst, sw, mw, q + 4 * kFirst, sx + kFirst,
                                    sumx + kFirst, decoded);
  }
}

// M rows, all there are, times the strips of some streams, group by group.
template <class S, class F, int M>
void gemv_streams(const LinearArgs& a, const Streams& t) {
  const int count = S::kGemvStreams == 1 ? 1 : t.count;
  const Rows& x = *a.x;
  const int64_t groups = x.k_pad / F::kGroup;
  typename S::F32x16 acc[S::kGemvStreams][M];
  typename F::Cursor c[S::kGemvStreams];
  for (int i = 0; i < count; ++i) {
    c[i] = F::open(*a.w, t.first + i * t.apart);
    for (int r = 0; r < M; ++r) acc[i][r] = S::zero();
  }
  for (int64_t j = 0; j < groups; ++j) {
#pragma GCC unroll 1
    for (int i = 0; i < count; ++i)
      gemv_rows<S, F, M>(acc[i], c[i], x.q + j * F::kGroup * M, x.scale + j * M, x.sum + j * M);
  }
  for (int i = 0; i < count; ++i)
    for (int r = 0; r < M; ++r) write_outputs<S>(a, t.first + i * t.apart, r, acc[i][r]);
}

// As `gemv_streams`, with one scale per row: the integer sums of the groups add up, and the zero
// point of the whole row is taken off in the first of them.
template <class S, class F, int M>
void gemv_streams_row(const LinearArgs& a, const Streams& t) {
  using Dot = typename S::template Dot<F::kZeroPoint, F::kMaxCode>;
  constexpr int32_t kNone[M] = {};
  const int count = S::kGemvStreams == 1 ? 1 : t.count;
  const Rows& x = *a.x;
  const int64_t groups = x.k_pad / F::kGroup;
  typename S::I32x16 sums[S::kGemvStreams][M];
  typename F::Cursor c[S::kGemvStreams];
  for (int i = 0; i < count; ++i) {
    c[i] = F::open(*a.w, t.first + i * t.apart);
    for (int r = 0; r < M; ++r) sums[i][r] = S::set1_i32(0);
  }
  for (int64_t j = 0; j < groups; ++j) {
    const int8_t* q = x.q + j * F::kGroup * M;
    const int32_t* sumx = j == 0 ? x.sum : kNone;
#pragma GCC unroll 1
    for (int i = 0; i < count; ++i) {
      typename Dot::Acc dot[M];
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) dot[r] = Dot::init(sumx[r]);
      F::template group<S>(
          c[i], [&](int b, typename S::U8x64 w) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int r = 0; r < M; ++r) Dot::step(dot[r], w, q + (b * M + r) * 4);
          });
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) sums[i][r] = S::add_i32(sums[i][r], Dot::finish(dot[r], sumx[r]));
    }
  }
  for (int i = 0; i < count; ++i)
    for (int r = 0; r < M; ++r)
      write_outputs<S>(a, t.first + i * t.apart, r,
                       scale_row<S, F>(sums[i][r], F::template scale<S>(c[i]), x.scale[r]));
}

// Floats: two chains, even and odd inputs; `pairs` pairs of inputs at cursor c.
template <class S, class F, int M>
LW_INLINE void gemv_pairs(typename S::F32x16* sums, typename F::Cursor& c, const float* f,
                          int64_t pairs) {
  typename S::F32x16 even_sum[M], odd_sum[M];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
    even_sum[r] = sums[2 * r];
    odd_sum[r] = sums[2 * r + 1];
  }
  for (int64_t i = 0; i < pairs; ++i) {
    typename S::F32x16 even, odd;
    F::template pair<S>(c, even, odd);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      even_sum[r] = S::fma(even, S::set1(f[2 * r]), even_sum[r]);
      odd_sum[r] = S::fma(odd, S::set1(f[2 * r + 1]), odd_sum[r]);
    }
    f += 2 * M;
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
    sums[2 * r] = even_sum[r];
    sums[2 * r + 1] = odd_sum[r];
  }
}

template <class S, class F, int M>
void gemv_streams_float(const LinearArgs& a, const Streams& t) {
  constexpr int64_t kRun = 16;  // pairs of one stream at a time: 1 KB
  const int count = S::kGemvStreams == 1 ? 1 : t.count;
  const int64_t pairs = a.x->k_pad / 2, run = count == 1 ? pairs : kRun;
  typename S::F32x16 sums[S::kGemvStreams][2 * M];
  typename F::Cursor c[S::kGemvStreams];
  for (int i = 0; i < count; ++i) {
    c[i] = F::open(*a.w, t.first + i * t.apart);
    for (int r = 0; r < 2 * M; ++r) sums[i][r] = S::zero();
  }
  for (int64_t p = 0; p < pairs; p += run) {
#pragma GCC unroll 1
    for (int i = 0; i < count; ++i)
      gemv_pairs<S, F, M>(sums[i], c[i], a.x->f + 2 * M * p, run < pairs - p ? run : pairs - p);
  }
  for (int i = 0; i < count; ++i)
    for (int r = 0; r < M; ++r)
      write_outputs<S>(a, t.first + i * t.apart, r, S::add(sums[i][2 * r], sums[i][2 * r + 1]));
}

// f(streams) for the strips in kGemvStreams equal runs side by side, then for what is left.
template <class S, class F>
LW_INLINE void each_streams(const LinearArgs& a, F take) {
  constexpr int kCount = S::kGemvStreams;
  const int64_t run = (a.strip_end - a.strip_begin) / kCount;
  for (int64_t s = 0; s < run; ++s) take({a.strip_begin + s, run, kCount});
  const int64_t rest = a.strip_begin + run * kCount;
  if (rest < a.strip_end) take({rest, 1, static_cast<int>(a.strip_end - rest)});
}

template <class S, class F, int M>
void gemv_block(const LinearArgs& a) {
  each_streams<S>(a, [&](const Streams& t) {
    if constexpr (F::kGroup == 0)
      gemv_streams_float<S, F, M>(a, t);
    else if constexpr (F::kRowScale)
      gemv_streams_row<S, F, M>(a, t);
    else
      gemv_streams<S, F, M>(a, t);
  });
}

}  // namespace
}  // namespace lacewing
