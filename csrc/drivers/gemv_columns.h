// Few rows times strips that keep whole columns of inputs: the same columns are taken out of the
// activations, and what is left of both is a dense product. Work and bytes fall with what is kept.
// No format, no ISA here.
//
// 4096 x 4096, one row, two threads of a Zen 4, AVX-512, at zeros of 50, 70 and 80 %: 35, 37 and 32
// GB/s where dense w8a8 has 39. Reading 2, 4 or 8 strips side by side, with prefetching (far
// distance 4, 4 and 2 KB), did not help: 27 to 31, 26 to 29 and 26 to 29 (dense 32 to 35 in those
// runs). 4 without prefetching had 43 at 50 % (dense 40), but 34 and 30 at 70 and 80 %; a guess at
// why: nothing is read while four strips' columns are taken.
#pragma once

#include "drivers/gemv.h"

namespace lacewing {
namespace {

// From one row to the next in scratch: not so that they share the sets of L1, and with room for the
// 64 bytes that the last step of a compression writes.
constexpr int64_t column_stride(int64_t k_pad) { return k_pad + 2 * 64; }

// What the strips of all streams keep of the rows, then the rows, if they are interleaved.
template <class S>
constexpr int64_t column_bytes(int64_t m, int64_t k_pad) {
  return (S::kGemvStreams + (m > 1 ? 1 : 0)) * m * column_stride(k_pad);
}

// Whether scratch holds them. Longer rows are gemm's.
template <class S>
bool columns_fit(const Rows& x) {
  return column_bytes<S>(x.m, x.k_pad) <= static_cast<int64_t>(kLinearScratch);
}

struct PlainRows {
  const int8_t* q;
  int64_t stride;
};

template <int M>
PlainRows separate_rows(const Rows& x, int8_t* to) {
  if constexpr (M == 1) return {x.q, 0};
  const int64_t stride = column_stride(x.k_pad);
  for (int64_t i = 0; i < x.k_pad; i += 4)
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) __builtin_memcpy(to + r * stride + i, x.q + i * M + 4 * r, 4);
  return {to, stride};
}

// What a strip keeps, as far as it is not multiplied yet, and the sums of the rest.
template <class S, int M>
struct KeptColumns {
  const uint8_t* codes;
  const int8_t* q;  // [M], column_stride apart
  int64_t blocks;
  int32_t sumx[M];  // of the activations; 0 once the zero point is taken off
  typename S::I32x16 dot[M];
};

// The columns of M rows that the strip at cursor c keeps, to `to`.
template <class S, class F, int M>
KeptColumns<S, M> keep_columns(const typename F::Cursor& c, const PlainRows& x, int64_t k_pad,
                               int8_t* to) {
  const int64_t stride = column_stride(k_pad);
  int64_t count = 0;
  for (int64_t i = 0; i < k_pad; i += 64) {
    const uint64_t mask = load_u64(c.bitmap + i / 8);
    int64_t more = 0;
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
      more = S::compress(to + r * stride + count, mask, x.q + r * x.stride + i);
    count += more;
  }
  KeptColumns<S, M> kept;
  kept.codes = c.blocks;
  kept.q = to;
  kept.blocks = (count + 3) / 4;
  for (int r = 0; r < M; ++r) {
    int8_t* q = to + r * stride;
    __builtin_memset(q + count, 0, 64);
    auto sum = S::set1_i32(0);
    for (int64_t i = 0; i < count; i += 64)
      sum = S::add_i8(sum, S::load_u8(reinterpret_cast<const uint8_t*>(q + i)));
    kept.sumx[r] = S::sum_i32(sum);
    kept.dot[r] = S::set1_i32(0);
  }
  return kept;
}

// The next `count` blocks.
template <class S, class F, int M>
LW_INLINE void multiply_columns(KeptColumns<S, M>& kept, int64_t count, int64_t stride) {
  using Dot = typename S::template Dot<F::kZeroPoint, F::kMaxCode>;
  constexpr int kChains = M == 1 ? 4 : M < 4 ? 2 : 1, kSteps = 4;
  typename Dot::Acc dot[kChains][M];
#pragma GCC unroll 4
  for (int i = 0; i < kChains; ++i)
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) dot[i][r] = Dot::init(i ? 0 : kept.sumx[r]);
  const uint8_t* codes = kept.codes;
  const int8_t* q = kept.q;
  const auto step = [&](int chain, int at) __attribute__((always_inline)) {
    prefetch_stream<S>(codes + 64 * at);
    const auto w = S::load_u8(codes + 64 * at);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) Dot::step(dot[chain][r], w, q + r * stride + 4 * at);
  };
  int64_t b = 0;
  for (; b + kSteps <= count; b += kSteps, codes += 64 * kSteps, q += 4 * kSteps) {
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) step(i % kChains, i);
  }
  for (; b < count; ++b, codes += 64, q += 4) step(0, 0);
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i)
      kept.dot[r] = S::add_i32(kept.dot[r], Dot::finish(dot[i][r], i ? 0 : kept.sumx[r]));
    kept.sumx[r] = 0;
  }
  kept.codes = codes;
  kept.q = q;
  kept.blocks -= count;
}

// M rows, all there are, times the strips of some streams, a run of blocks of each in turn.
template <class S, class F, int M>
void gemv_column_streams(const LinearArgs& a, const Streams& t, const PlainRows& x, int8_t* room) {
  constexpr int64_t kRun = 16;  // 1 KB
  const int count = S::kGemvStreams == 1 ? 1 : t.count;
  const int64_t k_pad = a.x->k_pad, stride = column_stride(k_pad);
  KeptColumns<S, M> kept[S::kGemvStreams];
  int64_t longest = 0;
  for (int i = 0; i < count; ++i) {
    kept[i] = keep_columns<S, F, M>(F::open(*a.w, t.first + i * t.apart), x, k_pad,
                                    room + i * M * stride);
    if (kept[i].blocks > longest) longest = kept[i].blocks;
  }
  const int64_t run = count == 1 ? longest : kRun;
  for (int64_t b = 0; b < longest; b += run) {
#pragma GCC unroll 1
    for (int i = 0; i < count; ++i)
      multiply_columns<S, F, M>(kept[i], run < kept[i].blocks ? run : kept[i].blocks, stride);
  }
  for (int i = 0; i < count; ++i) {
    const int64_t strip = t.first + i * t.apart;
    const auto sw = F::template scale<S>(F::open(*a.w, strip));
    for (int r = 0; r < M; ++r)
      write_outputs<S>(a, strip, r, scale_row<S, F>(kept[i].dot[r], sw, a.x->scale[r]));
  }
}

template <class S, class F, int M>
void gemv_columns(const LinearArgs& a) {
  auto* room = static_cast<int8_t*>(a.scratch);
  const PlainRows x =
      separate_rows<M>(*a.x, room + S::kGemvStreams * M * column_stride(a.x->k_pad));
  each_streams<S>(a, [&](const Streams& t) { gemv_column_streams<S, F, M>(a, t, x, room); });
}

}  // namespace
}  // namespace lacewing
