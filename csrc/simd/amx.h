// Tile operations of AMX, twice with one interface: the instructions, and "software tiles" in plain
// C++, which say what the instructions do and run everywhere. Drivers are templates over the two.
//
// Tile numbers are template arguments, because they are part of the instructions. What the
// operations mean is stated at SoftwareTiles.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/inline.h"

namespace lacewing {
namespace {

// Shapes of the eight tiles, as LDTILECFG reads them (palette 1: 16 rows of 64 bytes at most).
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

// The instructions. Not the compiler's intrinsics: `_tile_loadconfig` of GCC 12 is an asm that
// claims to read 8 bytes and clobbers no memory, so the compiler drops the stores that fill the
// shapes, and the first tile instruction dies of SIGILL. Here everything is volatile and clobbers
// memory: tiles are loaded and stored behind the compiler's back, and order is what we ask for.
struct AmxTiles {
  LW_INLINE void configure(const TileShapes& s) {
    __asm__ volatile("ldtilecfg %0" : : "m"(s) : "memory");
  }
  LW_INLINE void release() { __asm__ volatile("tilerelease" : : : "memory"); }

  template <int T>
  LW_INLINE void load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  LW_INLINE void load_once(const void* p, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  LW_INLINE void store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  LW_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T) : "memory");
  }

#define LW_TILE_DOT(name, instruction)                           \
  template <int C, int A, int B>                                 \
  LW_INLINE void name() {                                        \
    __asm__ volatile(instruction " %%tmm%c2, %%tmm%c1, %%tmm%c0" \
                     :                                           \
                     : "i"(C), "i"(A), "i"(B)                    \
                     : "memory");                                \
  }
  LW_TILE_DOT(dot_bf16, "tdpbf16ps")
  LW_TILE_DOT(dot_u8_s8, "tdpbusd")
  LW_TILE_DOT(dot_s8_u8, "tdpbsud")
  LW_TILE_DOT(dot_s8_s8, "tdpbssd")
#undef LW_TILE_DOT
};

// The same by software: the slow twin. What would be a fault of the instruction (#UD: tiles without
// shapes, or of shapes that do not fit) ends the process here too.
struct SoftwareTiles {
  // Takes over the shapes; all tiles are zero.
  void configure(const TileShapes& s) {
    shapes_ = s;
    std::memset(tiles_, 0, sizeof(tiles_));
  }
  // Forgets tiles and shapes.
  void release() { shapes_ = TileShapes{}; }

  // Row r of tile T from p + r * stride; what is beyond its shape becomes zero.
  template <int T>
  void load(const void* p, int64_t stride) {
    require(shapes_.rows[T] > 0);
    std::memset(tiles_[T], 0, sizeof(tiles_[T]));
    for (int r = 0; r < shapes_.rows[T]; ++r)
      std::memcpy(tiles_[T][r], static_cast<const uint8_t*>(p) + r * stride, shapes_.row_bytes[T]);
  }
  // The same, for data that will not be needed again soon (a hint to the caches).
  template <int T>
  void load_once(const void* p, int64_t stride) {
    load<T>(p, stride);
  }
  template <int T>
  void store(void* p, int64_t stride) {
    require(shapes_.rows[T] > 0);
    for (int r = 0; r < shapes_.rows[T]; ++r)
      std::memcpy(static_cast<uint8_t*>(p) + r * stride, tiles_[T][r], shapes_.row_bytes[T]);
  }
  template <int T>
  void zero() {
    require(shapes_.rows[T] > 0);
    std::memset(tiles_[T], 0, sizeof(tiles_[T]));
  }

  // C[m][n] += sum over k of A[m][k] * B[k / 4][4 n + k % 4]: bytes of A and B unsigned (u8) or
  // signed (s8), C int32 and exact (it wraps, as the instruction does).
  template <int C, int A, int B>
  void dot_u8_s8() {
    dot_bytes<C, A, B, uint8_t, int8_t>();
  }
  template <int C, int A, int B>
  void dot_s8_u8() {
    dot_bytes<C, A, B, int8_t, uint8_t>();
  }
  template <int C, int A, int B>
  void dot_s8_s8() {
    dot_bytes<C, A, B, int8_t, int8_t>();
  }

  // C[m][n] (f32) += sum over pairs k of bf16, in the documented order: two chains of fused
  // multiply-adds from zero, over the first and the second of every pair; their sum; onto C. Every
  // step rounds to nearest even; subnormal operands count as zero, subnormal results become zero.
  template <int C, int A, int B>
  __attribute__((noinline)) void dot_bf16() {
    require(fit<C, A, B>());
    for (int m = 0; m < shapes_.rows[C]; ++m) {
      float chains[2][16] = {};
      for (int k = 0; k < shapes_.row_bytes[A] / 4; ++k)
        for (int n = 0; n < shapes_.row_bytes[C] / 4; ++n)
          for (int i = 0; i < 2; ++i)
            chains[i][n] = flush(__builtin_fmaf(bf16(tiles_[A][m] + 4 * k + 2 * i),
                                                bf16(tiles_[B][k] + 4 * n + 2 * i), chains[i][n]));
      for (int n = 0; n < shapes_.row_bytes[C] / 4; ++n) {
        float sum;
        std::memcpy(&sum, tiles_[C][m] + 4 * n, 4);
        sum = flush(flush(sum) + flush(chains[0][n] + chains[1][n]));
        std::memcpy(tiles_[C][m] + 4 * n, &sum, 4);
      }
    }
  }

 private:
  static LW_INLINE void require(bool ok) {
    if (!ok) __builtin_trap();
  }
  template <int C, int A, int B>
  bool fit() const {
    const TileShapes& s = shapes_;
    return s.rows[C] > 0 && s.rows[C] == s.rows[A] && s.row_bytes[C] == s.row_bytes[B] &&
           s.row_bytes[A] == 4 * s.rows[B];
  }
  template <int C, int A, int B, class TA, class TB>
  __attribute__((noinline)) void dot_bytes() {
    require(fit<C, A, B>());
    for (int m = 0; m < shapes_.rows[C]; ++m) {
      uint32_t sums[16];
      std::memcpy(sums, tiles_[C][m], 64);
      for (int k = 0; k < shapes_.row_bytes[A] / 4; ++k)
        for (int n = 0; n < shapes_.row_bytes[C] / 4; ++n)
          for (int i = 0; i < 4; ++i)
            sums[n] += static_cast<uint32_t>(static_cast<TA>(tiles_[A][m][4 * k + i]) *
                                             static_cast<TB>(tiles_[B][k][4 * n + i]));
      std::memcpy(tiles_[C][m], sums, 64);
    }
  }
  static float flush(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? x * 0.0f : x; }
  static float bf16(const uint8_t* p) {
    const uint32_t bits = static_cast<uint32_t>(p[0]) << 16 | static_cast<uint32_t>(p[1]) << 24;
    float x;
    std::memcpy(&x, &bits, 4);
    return flush(x);
  }

  TileShapes shapes_;
  alignas(64) uint8_t tiles_[8][16][64];
};

}  // namespace
}  // namespace lacewing
