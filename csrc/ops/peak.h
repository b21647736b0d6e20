// Keeps the multipliers of one thread busy (measuring the peak of an ISA).
#pragma once

#include "core/types.h"

namespace lacewing {
namespace {

// As many sums as hide the latency and fit the registers; the values do not matter.
template <class S>
int64_t spin_float(int64_t turns) {
  constexpr int kSums = S::kFloatSums;
  typename S::F32x16 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = S::set1(static_cast<float>(i));
  const auto w = S::set1(0.5f), x = S::set1(1.0f);
  for (int64_t t = 0; t < turns; ++t) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sums[i] = S::fma(sums[i], w, x);
  }
  auto total = S::zero();
  for (int i = 0; i < kSums; ++i) total = S::add(total, sums[i]);
  volatile float sink = S::sum(total);
  static_cast<void>(sink);
  return turns * kSums * 16 * 2;
}

// Codes up to 15: no ISA needs to widen those first. The activations are broadcast from L1, as they
// are in every kernel.
template <class S>
int64_t spin_int8(int64_t turns) {
  constexpr int kSums = S::kFloatSums;
  using Dot = typename S::template Dot<8, 15>;
  alignas(64) uint8_t code[64];
  alignas(64) int8_t x[4 * kSums];
  for (int i = 0; i < 64; ++i) code[i] = static_cast<uint8_t>(i % 16);
  for (int i = 0; i < 4 * kSums; ++i) x[i] = static_cast<int8_t>(i % 5 - 2);
  const auto w = S::load_u8(code);
  int64_t total = 0;
  for (int64_t t = 0; t < turns; t += 8) {  // as long as a group of 32 inputs
    typename Dot::Acc acc[kSums];
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) acc[i] = Dot::init(0);
    for (int step = 0; step < 8; ++step) {
      __asm__ volatile("" : : "r"(x) : "memory");  // x may have changed
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i) Dot::step(acc[i], w, x + 4 * i);
    }
    auto sum = S::set1_i32(0);
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sum = S::add_i32(sum, Dot::finish(acc[i], 0));
    total += S::sum_i32(sum);
  }
  volatile int64_t sink = total;
  static_cast<void>(sink);
  return (turns + 7) / 8 * 8 * kSums * 64 * 2;
}

}  // namespace
}  // namespace lacewing
