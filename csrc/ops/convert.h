// Floats of other widths as f32, and back.
#pragma once

#include "ops/elementwise.h"

namespace lacewing {
namespace {

template <class S>
void widen(Float type, const void* from, int64_t n, float* to) {
  if (type == Float::f32) {
    __builtin_memcpy(to, from, static_cast<size_t>(n) * 4);
    return;
  }
  const auto* halves = static_cast<const uint16_t*>(from);
  for_chunks(n, [=](int64_t i, int64_t lanes) {
    uint16_t whole[16] = {};
    const uint16_t* at = lanes == 16 ? halves + i : whole;
    if (lanes < 16) __builtin_memcpy(whole, halves + i, static_cast<size_t>(lanes) * 2);
    store_lanes<S>(to + i, type == Float::bf16 ? S::load_bf16(at) : S::load_f16(at), lanes);
  });
}

template <class S>
void narrow(Float type, const float* from, int64_t n, void* to) {
  if (type == Float::f32) {
    __builtin_memcpy(to, from, static_cast<size_t>(n) * 4);
    return;
  }
  auto* halves = static_cast<uint16_t*>(to);
  for_chunks(n, [=](int64_t i, int64_t lanes) {
    uint16_t whole[16];
    uint16_t* at = lanes == 16 ? halves + i : whole;
    const auto v = load_lanes<S>(from + i, lanes);
    if (type == Float::bf16)
      S::store_bf16(at, v);
    else
      S::store_f16(at, v);
    if (lanes < 16) __builtin_memcpy(halves + i, whole, static_cast<size_t>(lanes) * 2);
  });
}

}  // namespace
}  // namespace lacewing
