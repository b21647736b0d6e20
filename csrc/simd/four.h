// Of four neighbouring bytes some are kept: what the vocabularies look up by the four bits that say
// which.
#pragma once

#include <cstdint>

namespace lacewing {
namespace {

// Which of the kept bytes, counted from 0, goes to byte i; 0x80 to what is absent. As a shuffle of
// the 16 bytes of four dwords.
constexpr uint8_t rank_in_four(int bits, int i) {
  const int before = bits & ((1 << i) - 1);
  const int rank = (before & 1) + (before >> 1 & 1) + (before >> 2);
  return static_cast<uint8_t>(bits >> i & 1 ? rank : 0x80);
}
struct FourTable {
  uint8_t order[16][16];
  uint32_t absent[16];  // all ones in the bytes that are not kept
};
constexpr FourTable make_four_table() {
  FourTable t{};
  for (int bits = 0; bits < 16; ++bits)
    for (int i = 0; i < 16; ++i) {
      const uint8_t rank = rank_in_four(bits, i % 4);
      t.order[bits][i] = static_cast<uint8_t>(rank < 0x80 ? i / 4 * 4 + rank : rank);
      if (i < 4 && rank == 0x80) t.absent[bits] |= 0xffu << 8 * i;
    }
  return t;
}
alignas(64) constexpr FourTable kFour = make_four_table();

}  // namespace
}  // namespace lacewing
