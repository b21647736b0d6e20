// The vocabulary in plain C++: the slow twin of every ISA, written to be read.
// One member of the vocabulary means the same bits on every ISA; what it means is stated here.
#pragma once

#include <cstring>

#include "core/inline.h"
#include "core/types.h"

namespace lacewing {
namespace {

struct Scalar {
  static constexpr const char* kName = "scalar";

  struct F32x16 {
    float v[16];
  };
  struct I32x16 {
    int32_t v[16];
  };
  struct U8x64 {
    uint8_t v[64];
  };

  template <class F>
  static LW_INLINE F32x16 map(F f) {
    F32x16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = f(i);
    return r;
  }
  template <class F>
  static LW_INLINE I32x16 map_i32(F f) {
    I32x16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = f(i);
    return r;
  }
  template <class F>
  static LW_INLINE U8x64 map_u8(F f) {
    U8x64 r;
    for (int i = 0; i < 64; ++i) r.v[i] = static_cast<uint8_t>(f(i));
    return r;
  }

  // ---- f32
  static LW_INLINE F32x16 zero() { return set1(0.0f); }
  static LW_INLINE F32x16 set1(float x) {
    return map([&](int) { return x; });
  }
  static LW_INLINE F32x16 load(const float* p) {
    return map([&](int i) { return p[i]; });
  }
  static LW_INLINE void store(float* p, F32x16 a) {
    for (int i = 0; i < 16; ++i) p[i] = a.v[i];
  }
  // The first n of 16 lanes, the rest 0; no byte beyond is touched.
  static LW_INLINE F32x16 load_n(const float* p, int64_t n) {
    return map([&](int i) { return i < n ? p[i] : 0.0f; });
  }
  static LW_INLINE void store_n(float* p, F32x16 a, int64_t n) {
    for (int i = 0; i < 16 && i < n; ++i) p[i] = a.v[i];
  }
  static LW_INLINE F32x16 add(F32x16 a, F32x16 b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  static LW_INLINE F32x16 sub(F32x16 a, F32x16 b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
  }
  static LW_INLINE F32x16 mul(F32x16 a, F32x16 b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  static LW_INLINE F32x16 div(F32x16 a, F32x16 b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
  }
  // a * b + c, rounded once.
  static LW_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return map([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
  }
  // As the instruction does it: the second operand if either is NaN.
  static LW_INLINE F32x16 max(F32x16 a, F32x16 b) {
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static LW_INLINE F32x16 min(F32x16 a, F32x16 b) {
    return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static LW_INLINE F32x16 abs(F32x16 a) {
    return map([&](int i) { return __builtin_fabsf(a.v[i]); });
  }
  static LW_INLINE F32x16 neg(F32x16 a) {
    return map([&](int i) { return -a.v[i]; });
  }
  static LW_INLINE F32x16 round_even(F32x16 a) {
    return map([&](int i) { return round_one(a.v[i]); });
  }
  static LW_INLINE F32x16 sqrt(F32x16 a) {
    return map([&](int i) { return __builtin_sqrtf(a.v[i]); });
  }
  // Tree: lanes i and i + 8, then 4, 2, 1.
  static LW_INLINE float sum(F32x16 a) {
    for (int h = 8; h; h /= 2)
      for (int i = 0; i < h; ++i) a.v[i] = a.v[i] + a.v[i + h];
    return a.v[0];
  }
  static LW_INLINE float hmax(F32x16 a) {
    for (int h = 8; h; h /= 2)
      for (int i = 0; i < h; ++i) a.v[i] = a.v[i] > a.v[i + h] ? a.v[i] : a.v[i + h];
    return a.v[0];
  }
  // `sum` and `hmax` of 8 rows of 16.
  static LW_INLINE void sum_rows(float* to, const float* rows) {
    for (int r = 0; r < 8; ++r) to[r] = sum(load(rows + 16 * r));
  }
  static LW_INLINE void hmax_rows(float* to, const float* rows) {
    for (int r = 0; r < 8; ++r) to[r] = hmax(load(rows + 16 * r));
  }
  static LW_INLINE F32x16 select_gt(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
    return map([&](int i) { return a.v[i] > b.v[i] ? x.v[i] : y.v[i]; });
  }
  static LW_INLINE F32x16 from_i32(I32x16 a) {
    return map([&](int i) { return static_cast<float>(a.v[i]); });
  }
  // Round to nearest even; what does not fit becomes INT32_MIN, as in hardware.
  static LW_INLINE I32x16 to_i32(F32x16 a) {
    return map_i32([&](int i) {
      const float r = round_one(a.v[i]);
      return r >= -2147483648.0f && r < 2147483648.0f ? static_cast<int32_t>(r) : INT32_MIN;
    });
  }
  static LW_INLINE F32x16 load_f16(const uint16_t* p) {
    return map([&](int i) { return f16_to_f32(p[i]); });
  }
  static LW_INLINE void store_f16(uint16_t* p, F32x16 a) {
    for (int i = 0; i < 16; ++i) p[i] = f32_to_f16(a.v[i]);
  }
  static LW_INLINE F32x16 load_bf16(const uint16_t* p) {
    return map([&](int i) { return bits_f32(static_cast<uint32_t>(p[i]) << 16); });
  }
  // Rounds to nearest even; a NaN stays one.
  static LW_INLINE void store_bf16(uint16_t* p, F32x16 a) {
    for (int i = 0; i < 16; ++i) {
      const uint32_t u = f32_bits(a.v[i]);
      const bool nan = (u & 0x7fffffff) > 0x7f800000;
      p[i] = static_cast<uint16_t>((nan ? u | 0x400000 : u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
  }
  // 2^e for e in -126..127
  static LW_INLINE F32x16 pow2(I32x16 e) {
    return map([&](int i) { return bits_f32(static_cast<uint32_t>(e.v[i] + 127) << 23); });
  }
  // p * 2^n for whole numbers n in -126..127 that leave p a normal number.
  static LW_INLINE F32x16 scale2(F32x16 p, F32x16 n) { return mul(p, pow2(to_i32(n))); }

  // ---- i32
  static LW_INLINE I32x16 set1_i32(int32_t x) {
    return map_i32([&](int) { return x; });
  }
  static LW_INLINE I32x16 load_i32(const int32_t* p) {
    return map_i32([&](int i) { return p[i]; });
  }
  static LW_INLINE void store_i32(int32_t* p, I32x16 a) {
    for (int i = 0; i < 16; ++i) p[i] = a.v[i];
  }
  static LW_INLINE I32x16 add_i32(I32x16 a, I32x16 b) {
    return map_i32([&](int i) { return a.v[i] + b.v[i]; });
  }
  static LW_INLINE I32x16 max_i32(I32x16 a, I32x16 b) {
    return map_i32([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  // 16 bytes; the values are in range.
  static LW_INLINE void store_i8(int8_t* p, I32x16 a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
  }
  static LW_INLINE int32_t sum_i32(I32x16 a) {
    int32_t s = 0;
    for (int i = 0; i < 16; ++i) s += a.v[i];
    return s;
  }

  // ---- u8: a VNNI block, 16 outputs x 4 inputs
  static LW_INLINE U8x64 load_u8(const uint8_t* p) {
    U8x64 r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  static LW_INLINE void store_u8(uint8_t* p, const U8x64& a) { std::memcpy(p, a.v, 64); }
  static LW_INLINE U8x64 and_u8(U8x64 a, uint8_t c) {
    return map_u8([&](int i) { return a.v[i] & c; });
  }
  static LW_INLINE U8x64 shr4_u8(U8x64 a) {
    return map_u8([&](int i) { return a.v[i] >> 4; });
  }
  static LW_INLINE U8x64 or_u8(U8x64 a, U8x64 b) {
    return map_u8([&](int i) { return a.v[i] | b.v[i]; });
  }
  // (a >> Shift) & mask, or << of the negative; the mask keeps nothing that another byte shifts in.
  template <int Shift>
  static LW_INLINE U8x64 shift_and(U8x64 a, uint8_t mask) {
    return map_u8([&](int i) { return (Shift < 0 ? a.v[i] << -Shift : a.v[i] >> Shift) & mask; });
  }
  // The five digits, in base 3, of the fractions a / 256 (see `Ternary`).
  static LW_INLINE void trits(U8x64 a, U8x64 (&digits)[5]) {
    for (U8x64& digit : digits) {
      digit = map_u8([&](int i) { return 3 * a.v[i] >> 8; });
      a = map_u8([&](int i) { return 3 * a.v[i]; });
    }
  }
  // value is or-ed into the bytes whose mask bit is set.
  static LW_INLINE U8x64 or_mask(U8x64 a, uint64_t mask, uint8_t value) {
    return map_u8([&](int i) { return mask >> i & 1 ? a.v[i] | value : a.v[i]; });
  }
  // The next bytes of p onto the set bits of the bitmap (8 bytes, bit i for byte i), `fill`
  // elsewhere; moves p on. May read 64 bytes from p.
  static LW_INLINE U8x64 expand(uint8_t fill, const uint8_t* bitmap, const uint8_t*& p) {
    return map_u8([&](int i) { return bit(bitmap, i) ? *p++ : fill; });
  }
  // As `expand`, of the low or the high nibbles of the bytes.
  static LW_INLINE U8x64 expand_lo4(uint8_t fill, const uint8_t* bitmap, const uint8_t*& p) {
    return map_u8([&](int i) { return bit(bitmap, i) ? *p++ & 15 : fill; });
  }
  static LW_INLINE U8x64 expand_hi4(uint8_t fill, const uint8_t* bitmap, const uint8_t*& p) {
    return map_u8([&](int i) { return bit(bitmap, i) ? *p++ >> 4 : fill; });
  }
  // As `expand`, of 2-byte values onto the set bits of a bitmap of 4 bytes, zero elsewhere.
  static LW_INLINE U8x64 expand_u16(const uint8_t* bitmap, const uint8_t*& p) {
    return map_u8([&](int i) { return bit(bitmap, i / 2) ? *p++ : 0; });
  }
  // As `expand`, where the bitmap has two bits in every four: the first 32 bytes of `codes`. What
  // other bitmaps give is not stated.
  static LW_INLINE U8x64 expand_24(uint8_t fill, const uint8_t* bitmap, const U8x64& codes) {
    const uint8_t* p = codes.v;
    return expand(fill, bitmap, p);
  }
  // Byte i of a dword is one of its next bytes, in order, where bit i of `pattern` is set, `fill`
  // elsewhere. The bytes begin with byte `at` of the dword in the block `first` and go on in the
  // block `last`: the one behind it if there are not enough, else the same.
  static LW_INLINE U8x64 expand_lanes(uint8_t fill, int pattern, const uint8_t* first,
                                      const uint8_t* last, int at) {
    U8x64 r;
    for (int o = 0; o < 16; ++o) {
      int next = at;
      for (int i = 0; i < 4; ++i) {
        const bool set = pattern >> i & 1;
        r.v[4 * o + i] = set ? (next < 4 ? first : last)[4 * o + next % 4] : fill;
        next += set;
      }
    }
    return r;
  }
  // Those of the 64 bytes at `from` whose bit is set, in order; returns how many. May write 64
  // bytes.
  static LW_INLINE int64_t compress(int8_t* to, uint64_t mask, const int8_t* from) {
    int64_t count = 0;
    for (int i = 0; i < 64; ++i)
      if (mask >> i & 1) to[count++] = from[i];
    return count;
  }
  // Four neighbouring bytes, signed, onto each lane.
  static LW_INLINE I32x16 add_i8(I32x16 a, const U8x64& bytes) {
    for (int i = 0; i < 64; ++i) a.v[i / 4] += static_cast<int8_t>(bytes.v[i]);
    return a;
  }
  // A block of bf16 pairs `[16][2]`: the first or the second of every pair.
  static LW_INLINE F32x16 bf16_even(const U8x64& a) {
    return map([&](int i) { return bf16(a.v + 4 * i); });
  }
  static LW_INLINE F32x16 bf16_odd(const U8x64& a) {
    return map([&](int i) { return bf16(a.v + 4 * i + 2); });
  }

  // ---- what gemm_columns asks for beyond that (so avx2.h has none of it)
  // Eight inputs of 8 interleaved rows, [2][8][4], input by input: runs of 8 bytes.
  static LW_INLINE void split_rows(int8_t* to, int64_t stride, const int8_t* from) {
    for (int i = 0; i < 8; ++i)
      for (int r = 0; r < 8; ++r) to[i * stride + r] = from[(i / 4 * 8 + r) * 4 + i % 4];
  }
  // Four inputs of 64 rows as four blocks [16 rows][4 inputs]; row r is then at joined_row(r).
  static LW_INLINE void join_rows(U8x64 (&to)[4], const int8_t* a, const int8_t* b, const int8_t* c,
                                  const int8_t* d) {
    for (int r = 0; r < 64; ++r) {
      const int8_t four[4] = {a[r], b[r], c[r], d[r]};
      std::memcpy(to[joined_row(r) / 16].v + joined_row(r) % 16 * 4, four, 4);
    }
  }
  static constexpr int joined_row(int r) { return r / 4 % 4 * 16 + r / 16 * 4 + r % 4; }

  // ---- what the AMX driver asks for beyond that (so avx2.h has none of it)
  static LW_INLINE U8x64 sub_u8(const U8x64& a, uint8_t c) {
    return map_u8([&](int i) { return a.v[i] - c; });
  }
  // The same bits.
  static LW_INLINE I32x16 bits_i32(F32x16 a) {
    return map_i32([&](int i) { return static_cast<int32_t>(f32_bits(a.v[i])); });
  }
  // The block of bf16 pairs of which these are `bf16_even` and `bf16_odd`.
  static LW_INLINE U8x64 join_bf16(F32x16 even, F32x16 odd) {
    U8x64 r;
    for (int i = 0; i < 16; ++i) {
      const uint32_t pair = f32_bits(even.v[i]) >> 16 | f32_bits(odd.v[i]);
      std::memcpy(r.v + 4 * i, &pair, 4);
    }
    return r;
  }
  // Dwords `[16][8]` to 8 rows of 64 bytes, `[8][16]`.
  static LW_INLINE void transpose_16x8(uint8_t* to, const uint8_t* from) {
    for (int r = 0; r < 8; ++r)
      for (int i = 0; i < 16; ++i) std::memcpy(to + 64 * r + 4 * i, from + 32 * i + 4 * r, 4);
  }

  static LW_INLINE F32x16 floats_of_u8(const uint8_t* p) {
    return map([&](int i) { return static_cast<float>(p[i]); });
  }
  // ---- u8 as i16 [32]
  static LW_INLINE U8x64 set1_i16(int16_t x) {
    return map_i16([&](int) { return x; });
  }
  // round(a * b / 2^15), halves upwards.
  static LW_INLINE U8x64 mul_i16(U8x64 a, U8x64 b) {
    return map_i16([&](int i) { return (i16(a, i) * i16(b, i) + 0x4000) >> 15; });
  }
  static LW_INLINE U8x64 abs_i16(U8x64 a) {
    return map_i16([&](int i) { return i16(a, i) < 0 ? -i16(a, i) : i16(a, i); });
  }
  static LW_INLINE U8x64 max_i16(U8x64 a, U8x64 b) {
    return map_i16([&](int i) { return i16(a, i) > i16(b, i) ? i16(a, i) : i16(b, i); });
  }
  // Bits that the largest of numbers >= 0 takes: 0..15.
  static LW_INLINE int width_i16(U8x64 a) {
    int all = 0, width = 0;
    for (int i = 0; i < 32; ++i) all |= i16(a, i);
    for (; all >> width; ++width) {
    }
    return width;
  }
  // As bytes, a first; what does not fit becomes -128 or 127.
  static LW_INLINE U8x64 join_i16(U8x64 a, U8x64 b) {
    return map_u8([&](int i) {
      const int x = i16(i < 32 ? a : b, i % 32);
      return x < -128 ? -128 : x > 127 ? 127 : x;
    });
  }

  static LW_INLINE void prefetch_t0(const void* p) { __builtin_prefetch(p, 0, 3); }
  static LW_INLINE void prefetch_t1(const void* p) { __builtin_prefetch(p, 0, 2); }

  // Exact sum of (code - ZeroPoint) * q over one group, for 16 outputs of one row. x4: the 4
  // inputs of a block. Codes are at most MaxCode. sumx: sum of q over the group.
  template <int ZeroPoint, int MaxCode>
  struct Dot {
    struct Acc {
      I32x16 sum;
    };
    static LW_INLINE Acc init(int32_t sumx) { return {set1_i32(-ZeroPoint * sumx)}; }
    static LW_INLINE void step(Acc& acc, const U8x64& w, const int8_t* x4) {
      for (int o = 0; o < 16; ++o)
        for (int i = 0; i < 4; ++i) acc.sum.v[o] += w.v[4 * o + i] * x4[i];
    }
    static LW_INLINE I32x16 finish(const Acc& acc, int32_t) { return acc.sum; }
    // The roles exchanged: four codes, and a block of 16 rows x 4 activations.
    static LW_INLINE void step_by(I32x16& sum, const uint8_t* w4, const U8x64& x) {
      for (int r = 0; r < 16; ++r)
        for (int i = 0; i < 4; ++i) sum.v[r] += w4[i] * static_cast<int8_t>(x.v[4 * r + i]);
    }
  };

  // The same sum for many rows: weight blocks are brought once into the form that multiplies
  // fastest, kBlockBytes each, and so are the activations, kXBytes per row and block, if not 4. A
  // block takes kXBytes / 4 steps of 64 and 4 bytes. `flush` is due every kSteps steps and at the
  // group's end.
  template <int ZeroPoint, int MaxCode>
  struct PanelDot : Dot<ZeroPoint, MaxCode> {
    using Acc = typename Dot<ZeroPoint, MaxCode>::Acc;
    static constexpr int kBlockBytes = 64, kXBytes = 4, kSteps = 1 << 30;
    static LW_INLINE void prepare(uint8_t* p, const U8x64& w) { store_u8(p, w); }
    static LW_INLINE void prepare_x(uint8_t*, const int8_t*, int64_t) {}
    static LW_INLINE void step(Acc& acc, const U8x64& w, const uint8_t* x) {
      Dot<ZeroPoint, MaxCode>::step(acc, w, reinterpret_cast<const int8_t*>(x));
    }
    static LW_INLINE void flush(Acc&) {}
  };

  // Numbers 0..255, rounded, as bytes: of each operand the first four, then the next.
  static LW_INLINE U8x64 to_u8(F32x16 a, F32x16 b, F32x16 c, F32x16 d) {
    const I32x16 from[4] = {to_i32(a), to_i32(b), to_i32(c), to_i32(d)};
    return map_u8([&](int i) { return from[i / 4 % 4].v[i / 16 * 4 + i % 4]; });
  }
  // sum + the products of four such bytes, at most 128, with 4 codes -127..127, for 16 outputs.
  static LW_INLINE I32x16 add_products(I32x16 sum, const uint8_t* four, const U8x64& codes) {
    for (int o = 0; o < 16; ++o)
      for (int i = 0; i < 4; ++i) sum.v[o] += four[i] * static_cast<int8_t>(codes.v[4 * o + i]);
    return sum;
  }
  static constexpr int kFloatSums = 4;  // that keep the multipliers busy and fit the registers
  // Rows and strips that the inner loop of a panel takes at once.
  static constexpr int kPanelRows = 4, kPanelStrips = 1;
  // Rows that gemv takes; few, since this table is for correctness and unrolls expensively.
  static constexpr int kGemvWide = 2, kGemvNarrow = 2, kGemvFloat = 2;
  static constexpr int kGemvMost = 2;
  // Attention: sums in registers at once, and queries of a batch when there are many.
  static constexpr int kAttentionSums = 4, kAttentionBatch = 4;
  // Strips that gemv reads side by side.
  static constexpr int kGemvStreams = 1;
  // Whether many rows of activations go to the columns that a strip keeps (gemm_columns.h).
  static constexpr bool kColumnGemm = true;
  // Prefetching by software.
  static constexpr bool kPrefetch = false;
  static constexpr int kGemvBlock = 4;  // rows whose integer sums fit the registers

  // ---- below: private to this header
  static LW_INLINE int i16(const U8x64& a, int i) {
    int16_t x;
    std::memcpy(&x, a.v + 2 * i, 2);
    return x;
  }
  template <class F>
  static LW_INLINE U8x64 map_i16(F f) {
    U8x64 r;
    for (int i = 0; i < 32; ++i) {
      const auto x = static_cast<int16_t>(f(i));
      std::memcpy(r.v + 2 * i, &x, 2);
    }
    return r;
  }
  static LW_INLINE bool bit(const uint8_t* bitmap, int i) { return bitmap[i / 8] >> i % 8 & 1; }
  static LW_INLINE float bits_f32(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  static LW_INLINE uint32_t f32_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
  }
  static LW_INLINE float bf16(const uint8_t* p) {
    return bits_f32(static_cast<uint32_t>(p[0]) << 16 | static_cast<uint32_t>(p[1]) << 24);
  }
  static LW_INLINE float round_one(float x) {
    const float magic = 8388608.0f;  // 2^23: from there on every float is an integer
    const float a = __builtin_fabsf(x);
    if (!(a < magic)) return x;
    return __builtin_copysignf((a + magic) - magic, x);
  }
  static LW_INLINE float f16_to_f32(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) {
      const uint32_t quiet = mantissa ? 0x400000 : 0;
      return bits_f32(sign | 0x7f800000 | quiet | mantissa << 13);
    }
    if (exponent) return bits_f32(sign | (exponent + 112) << 23 | mantissa << 13);
    const float tiny = static_cast<float>(mantissa) * (1.0f / 16777216.0f);  // 2^-24, exact
    return bits_f32(sign | f32_bits(tiny));
  }
  static LW_INLINE uint16_t f32_to_f16(float f) {
    const uint32_t u = f32_bits(f), a = u & 0x7fffffff;
    const uint32_t sign = u >> 16 & 0x8000;
    if (a > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (a >> 13 & 1023));
    if (a >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
    if (a < 0x38800000) {  // subnormal: adding 1/2 rounds at 2^-24
      const float r = bits_f32(a) + 0.5f;
      return static_cast<uint16_t>(sign | (f32_bits(r) - 0x3f000000));
    }
    const uint32_t odd = a >> 13 & 1;
    return static_cast<uint16_t>(sign | ((a + 0xfff + odd - 0x38000000) >> 13));
  }
};

}  // namespace
}  // namespace lacewing
