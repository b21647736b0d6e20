// The vocabulary in AVX2 + FMA + F16C + BMI2. A block of 64 bytes is two registers.
#pragma once

#include <immintrin.h>

#include "core/inline.h"
#include "core/types.h"
#include "simd/four.h"

namespace lacewing {
namespace {

// Shuffles that expand 16 bytes, one table per byte of their bitmap: the sum of the two entries
// says which of the next 16 codes goes where, 0x80 and more for none. The first byte's entry also
// moves the second half on by the codes that the first half takes.
struct ExpandTables {
  uint8_t first[256][16], second[256][16];
};
constexpr ExpandTables make_expand_tables() {
  ExpandTables t{};
  for (int m = 0; m < 256; ++m) {
    int next = 0;
    for (int i = 0; i < 8; ++i) {
      const bool set = m >> i & 1;
      t.first[m][i] = t.second[m][i + 8] = static_cast<uint8_t>(set ? next : 0x80);
      next += set;
    }
    for (int i = 8; i < 16; ++i) t.first[m][i] = static_cast<uint8_t>(next);
  }
  return t;
}
alignas(64) constexpr ExpandTables kExpand = make_expand_tables();

// The same for 8 values of two bytes and the byte of their bitmap.
struct ExpandTable16 {
  uint8_t order[256][16];
};
constexpr ExpandTable16 make_expand_table16() {
  ExpandTable16 t{};
  for (int m = 0; m < 256; ++m) {
    int next = 0;
    for (int i = 0; i < 8; ++i) {
      const bool set = m >> i & 1;
      t.order[m][2 * i] = static_cast<uint8_t>(set ? next : 0x80);
      t.order[m][2 * i + 1] = static_cast<uint8_t>(set ? next + 1 : 0x80);
      next += set ? 2 : 0;
    }
  }
  return t;
}
alignas(64) constexpr ExpandTable16 kExpand16 = make_expand_table16();

// The bytes of 8 whose bits are set, in order.
struct CompressTable {
  uint8_t order[256][8];
};
constexpr CompressTable make_compress_table() {
  CompressTable t{};
  for (int m = 0; m < 256; ++m) {
    int count = 0;
    for (int i = 0; i < 8; ++i)
      if (m >> i & 1) t.order[m][count++] = static_cast<uint8_t>(i);
  }
  return t;
}
alignas(64) constexpr CompressTable kCompress = make_compress_table();

struct Avx2 {
  static constexpr const char* kName = "avx2";

  struct F32x16 {
    __m256 lo, hi;
  };
  struct I32x16 {
    __m256i lo, hi;
  };
  struct U8x64 {
    __m256i lo, hi;
  };

  // ---- f32
  static LW_INLINE F32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static LW_INLINE F32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static LW_INLINE F32x16 load(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  }
  static LW_INLINE void store(float* p, F32x16 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
  }
  static LW_INLINE F32x16 load_n(const float* p, int64_t n) {
    return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))};
  }
  static LW_INLINE void store_n(float* p, F32x16 a, int64_t n) {
    _mm256_maskstore_ps(p, first(n), a.lo);
    _mm256_maskstore_ps(p + 8, first(n - 8), a.hi);
  }
  static LW_INLINE F32x16 add(F32x16 a, F32x16 b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
  }
  static LW_INLINE F32x16 sub(F32x16 a, F32x16 b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
  }
  static LW_INLINE F32x16 mul(F32x16 a, F32x16 b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
  }
  static LW_INLINE F32x16 div(F32x16 a, F32x16 b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
  }
  static LW_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  static LW_INLINE F32x16 max(F32x16 a, F32x16 b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
  }
  static LW_INLINE F32x16 min(F32x16 a, F32x16 b) {
    return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
  }
  static LW_INLINE F32x16 abs(F32x16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
  }
  static LW_INLINE F32x16 neg(F32x16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_xor_ps(sign, a.lo), _mm256_xor_ps(sign, a.hi)};
  }
  static LW_INLINE F32x16 round_even(F32x16 a) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
  }
  static LW_INLINE F32x16 sqrt(F32x16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
  static LW_INLINE float sum(F32x16 a) {
    const __m256 s8 = _mm256_add_ps(a.lo, a.hi);
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
  }
  static LW_INLINE float hmax(F32x16 a) {
    const __m256 s8 = _mm256_max_ps(a.lo, a.hi);
    const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_max_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
  }
  static LW_INLINE void sum_rows(float* to, const float* rows) {
    for (int r = 0; r < 8; ++r) to[r] = sum(load(rows + 16 * r));
  }
  static LW_INLINE void hmax_rows(float* to, const float* rows) {
    for (int r = 0; r < 8; ++r) to[r] = hmax(load(rows + 16 * r));
  }
  static LW_INLINE F32x16 select_gt(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
    return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
            _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
  }
  static LW_INLINE F32x16 from_i32(I32x16 a) {
    return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
  }
  static LW_INLINE I32x16 to_i32(F32x16 a) {
    return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
  }
  static LW_INLINE F32x16 load_f16(const uint16_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  }
  static LW_INLINE void store_f16(uint16_t* p, F32x16 a) {
    __m128i* q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
  }
  static LW_INLINE F32x16 load_bf16(const uint16_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(q));
    const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  }
  static LW_INLINE void store_bf16(uint16_t* p, F32x16 a) {
    // packus works per 128-bit half: put the quarters in order afterwards.
    const __m256i w = _mm256_packus_epi32(round_bf16(a.lo), round_bf16(a.hi));
    store256(p, _mm256_permute4x64_epi64(w, 0xd8));
  }
  static LW_INLINE F32x16 pow2(I32x16 e) {
    const __m256i bias = _mm256_set1_epi32(127);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e.lo, bias), 23)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e.hi, bias), 23))};
  }
  static LW_INLINE F32x16 scale2(F32x16 p, F32x16 n) { return mul(p, pow2(to_i32(n))); }

  // ---- i32
  static LW_INLINE I32x16 set1_i32(int32_t x) {
    return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
  }
  static LW_INLINE I32x16 load_i32(const int32_t* p) { return {load256(p), load256(p + 8)}; }
  static LW_INLINE void store_i32(int32_t* p, I32x16 a) {
    store256(p, a.lo);
    store256(p + 8, a.hi);
  }
  static LW_INLINE I32x16 add_i32(I32x16 a, I32x16 b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
  }
  static LW_INLINE I32x16 max_i32(I32x16 a, I32x16 b) {
    return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
  }
  static LW_INLINE void store_i8(int8_t* p, I32x16 a) {
    // packs works per 128-bit half: put the quarters in order afterwards.
    const __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    const __m128i b = _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), b);
  }
  static LW_INLINE int32_t sum_i32(I32x16 a) {
    const __m256i s8 = _mm256_add_epi32(a.lo, a.hi);
    const __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
    const __m128i s2 = _mm_add_epi32(s4, _mm_shuffle_epi32(s4, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s2, _mm_shuffle_epi32(s2, 0xb1)));
  }

  // ---- u8
  static LW_INLINE U8x64 load_u8(const uint8_t* p) { return {load256(p), load256(p + 32)}; }
  static LW_INLINE void store_u8(uint8_t* p, U8x64 a) {
    store256(p, a.lo);
    store256(p + 32, a.hi);
  }
  static LW_INLINE U8x64 and_u8(U8x64 a, uint8_t c) {
    const __m256i v = _mm256_set1_epi8(static_cast<char>(c));
    return {_mm256_and_si256(a.lo, v), _mm256_and_si256(a.hi, v)};
  }
  static LW_INLINE U8x64 shr4_u8(U8x64 a) {
    return and_u8({_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)}, 15);
  }
  static LW_INLINE U8x64 or_u8(U8x64 a, U8x64 b) {
    return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
  }
  template <int Shift>
  static LW_INLINE U8x64 shift_and(U8x64 a, uint8_t mask) {
    if constexpr (Shift == 0) return and_u8(a, mask);
    if constexpr (Shift < 0)
      return and_u8({_mm256_slli_epi16(a.lo, -Shift), _mm256_slli_epi16(a.hi, -Shift)}, mask);
    return and_u8({_mm256_srli_epi16(a.lo, Shift), _mm256_srli_epi16(a.hi, Shift)}, mask);
  }
  static LW_INLINE void trits(U8x64 a, U8x64 (&digits)[5]) {
    for (U8x64& digit : digits) {
      digit = shift_and<6>({three_quarters(a.lo), three_quarters(a.hi)}, 3);
      a.lo = _mm256_add_epi8(_mm256_add_epi8(a.lo, a.lo), a.lo);
      a.hi = _mm256_add_epi8(_mm256_add_epi8(a.hi, a.hi), a.hi);
    }
  }
  static LW_INLINE U8x64 or_mask(U8x64 a, uint64_t mask, uint8_t value) {
    const __m256i v = _mm256_set1_epi8(static_cast<char>(value));
    const __m256i lo = spread(static_cast<uint32_t>(mask));
    const __m256i hi = spread(static_cast<uint32_t>(mask >> 32));
    return {_mm256_or_si256(a.lo, _mm256_and_si256(lo, v)),
            _mm256_or_si256(a.hi, _mm256_and_si256(hi, v))};
  }
  static LW_INLINE U8x64 expand(uint8_t fill, const uint8_t* bitmap, const uint8_t*& p) {
    return expand_cut(fill, bitmap, p, [](__m128i v) { return v; });
  }
  static LW_INLINE U8x64 expand_lo4(uint8_t fill, const uint8_t* bitmap, const uint8_t*& p) {
    const __m128i low = _mm_set1_epi8(15);
    return expand_cut(fill, bitmap, p, [=](__m128i v) { return _mm_and_si128(v, low); });
  }
  static LW_INLINE U8x64 expand_hi4(uint8_t fill, const uint8_t* bitmap, const uint8_t*& p) {
    const __m128i low = _mm_set1_epi8(15);
    return expand_cut(fill, bitmap, p,
                      [=](__m128i v) { return _mm_and_si128(_mm_srli_epi16(v, 4), low); });
  }
  static LW_INLINE U8x64 expand_u16(const uint8_t* bitmap, const uint8_t*& p) {
    uint32_t mask;
    __builtin_memcpy(&mask, bitmap, 4);
    const __m128i a = expand8_u16<0>(mask, p), b = expand8_u16<8>(mask, p);
    const __m128i c = expand8_u16<16>(mask, p), d = expand8_u16<24>(mask, p);
    p += 2 * _mm_popcnt_u32(mask);
    return {_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)};
  }
  static LW_INLINE U8x64 expand_24(uint8_t fill, const uint8_t* bitmap, U8x64 codes) {
    const __m256i f = _mm256_set1_epi8(static_cast<char>(fill));
    const __m256i c = _mm256_xor_si256(codes.lo, f);
    return {_mm256_xor_si256(expand8_24(bitmap, _mm256_permute4x64_epi64(c, 0x50)), f),
            _mm256_xor_si256(expand8_24(bitmap + 4, _mm256_permute4x64_epi64(c, 0xfa)), f)};
  }
  static LW_INLINE U8x64 expand_lanes(uint8_t fill, int pattern, const uint8_t* first,
                                      const uint8_t* last, int at) {
    const __m128i down = _mm_cvtsi32_si128(8 * at), up = _mm_cvtsi32_si128(32 - 8 * at);
    const __m128i* order = reinterpret_cast<const __m128i*>(kFour.order[pattern]);
    const __m256i lanes = _mm256_broadcastsi128_si256(_mm_load_si128(order));
    const __m256i fills =
        _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(kFour.absent[pattern])),
                         _mm256_set1_epi8(static_cast<char>(fill)));
    const auto half = [&](int offset) __attribute__((always_inline)) {
      const __m256i next = _mm256_or_si256(_mm256_srl_epi32(load256(first + offset), down),
                                           _mm256_sll_epi32(load256(last + offset), up));
      return _mm256_or_si256(_mm256_shuffle_epi8(next, lanes), fills);
    };
    return {half(0), half(32)};
  }
  static LW_INLINE int64_t compress(int8_t* to, uint64_t mask, const int8_t* from) {
    int64_t count = 0;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, mask >>= 8) {
      const uint8_t* order = kCompress.order[mask & 0xff];
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i));
      _mm_storel_epi64(
          reinterpret_cast<__m128i*>(to + count),
          _mm_shuffle_epi8(bytes, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(order))));
      count += _mm_popcnt_u32(mask & 0xff);
    }
    return count;
  }
  static LW_INLINE I32x16 add_i8(I32x16 a, U8x64 bytes) {
    const __m256i one = _mm256_set1_epi8(1), pairs = _mm256_set1_epi16(1);
    const auto fours = [&](__m256i v) __attribute__((always_inline)) {
      return _mm256_madd_epi16(_mm256_maddubs_epi16(one, v), pairs);
    };
    return {_mm256_add_epi32(a.lo, fours(bytes.lo)), _mm256_add_epi32(a.hi, fours(bytes.hi))};
  }
  static LW_INLINE F32x16 bf16_even(U8x64 a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(a.lo, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(a.hi, 16))};
  }
  static LW_INLINE F32x16 bf16_odd(U8x64 a) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(a.lo, high)),
            _mm256_castsi256_ps(_mm256_and_si256(a.hi, high))};
  }

  static LW_INLINE F32x16 floats_of_u8(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes)))};
  }

  // ---- u8 as i16 [32]
  static LW_INLINE U8x64 set1_i16(int16_t x) {
    return {_mm256_set1_epi16(x), _mm256_set1_epi16(x)};
  }
  static LW_INLINE U8x64 mul_i16(U8x64 a, U8x64 b) {
    return {_mm256_mulhrs_epi16(a.lo, b.lo), _mm256_mulhrs_epi16(a.hi, b.hi)};
  }
  static LW_INLINE U8x64 abs_i16(U8x64 a) {
    return {_mm256_abs_epi16(a.lo), _mm256_abs_epi16(a.hi)};
  }
  static LW_INLINE U8x64 max_i16(U8x64 a, U8x64 b) {
    return {_mm256_max_epi16(a.lo, b.lo), _mm256_max_epi16(a.hi, b.hi)};
  }
  static LW_INLINE int width_i16(U8x64 a) {
    const __m256i s8 = _mm256_or_si256(a.lo, a.hi);
    const __m128i s4 = _mm_or_si128(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
    const __m128i s2 = _mm_or_si128(s4, _mm_unpackhi_epi64(s4, s4));
    const auto all = static_cast<uint64_t>(_mm_cvtsi128_si64(s2));
    const uint64_t half = all | all >> 32;
    return 32 - static_cast<int>(_lzcnt_u32(static_cast<uint16_t>(half | half >> 16)));
  }
  // Packing works per 128 bits: put the quarters of the registers in order afterwards.
  static LW_INLINE U8x64 join_i16(U8x64 a, U8x64 b) {
    return {_mm256_permute4x64_epi64(_mm256_packs_epi16(a.lo, a.hi), 0xd8),
            _mm256_permute4x64_epi64(_mm256_packs_epi16(b.lo, b.hi), 0xd8)};
  }

  static LW_INLINE void prefetch_t0(const void* p) { __builtin_prefetch(p, 0, 3); }
  static LW_INLINE void prefetch_t1(const void* p) { __builtin_prefetch(p, 0, 2); }

  // Steps that i16 sums of two products can hold, at most 16: 8 for codes up to 15, 4 for 31.
  static constexpr int narrow_steps(int max_code) {
    const int steps = 32767 / (2 * 127 * max_code);
    return steps < 16 ? steps : 16;
  }

  // Codes up to 31: vpmaddubsw sums of two products, accumulated in i16 as long as they cannot
  // overflow, then widened. Wider codes: signed weights, |w| * sign(q, w), widened every step
  // (a pair is at most 2 * 128 * 127 < 2^15).
  template <int ZeroPoint, int MaxCode>
  struct Dot {
    static constexpr bool kNarrow = MaxCode <= 31;
    static_assert(kNarrow || ZeroPoint == 128);
    static constexpr int kSteps = narrow_steps(MaxCode);
    struct Acc {
      I32x16 sum;
      __m256i lo, hi;  // i16 pairs
      int steps;       // a constant once the group's loop is unrolled
    };
    static LW_INLINE Acc init(int32_t) {
      const __m256i z = _mm256_setzero_si256();
      return {{z, z}, z, z, 0};
    }
    static LW_INLINE void step(Acc& acc, U8x64 w, const int8_t* x4) {
      const __m256i x = broadcast4(x4);
      if constexpr (kNarrow) {
        acc.lo = _mm256_add_epi16(acc.lo, _mm256_maddubs_epi16(w.lo, x));
        acc.hi = _mm256_add_epi16(acc.hi, _mm256_maddubs_epi16(w.hi, x));
        if (++acc.steps == kSteps) widen(acc);
      } else {
        acc.sum.lo = _mm256_add_epi32(acc.sum.lo, signed_dot(w.lo, x));
        acc.sum.hi = _mm256_add_epi32(acc.sum.hi, signed_dot(w.hi, x));
      }
    }
    static LW_INLINE I32x16 finish(Acc acc, int32_t sumx) {
      if constexpr (!kNarrow) return acc.sum;
      if (acc.steps) widen(acc);
      if constexpr (ZeroPoint == 0) return acc.sum;
      return subtract_zero<ZeroPoint>(acc.sum, sumx);
    }
    static LW_INLINE void widen(Acc& acc) {
      const __m256i ones = _mm256_set1_epi16(1);
      acc.sum.lo = _mm256_add_epi32(acc.sum.lo, _mm256_madd_epi16(acc.lo, ones));
      acc.sum.hi = _mm256_add_epi32(acc.sum.hi, _mm256_madd_epi16(acc.hi, ones));
      acc.lo = acc.hi = _mm256_setzero_si256();
      acc.steps = 0;
    }
    static LW_INLINE __m256i signed_dot(__m256i code, __m256i x) {
      const __m256i w = _mm256_xor_si256(code, _mm256_set1_epi8(-128));
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
      return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
  };

  // Many rows. Narrow codes: as `Dot`, with the widening left to `flush`. Wide codes: signed i16,
  // inputs 0 and 2 of every output in one half, 1 and 3 in the other: vpmaddwd takes twice the
  // products per port of the sign trick.
  template <int ZeroPoint, int MaxCode, bool Narrow = MaxCode <= 31>
  struct PanelDot {
    static constexpr int kBlockBytes = 64, kXBytes = 4, kSteps = narrow_steps(MaxCode);
    struct Acc {
      I32x16 sum;
      __m256i lo, hi;
    };
    static LW_INLINE void prepare(uint8_t* p, U8x64 w) { store_u8(p, w); }
    static LW_INLINE void prepare_x(uint8_t*, const int8_t*, int64_t) {}
    static LW_INLINE Acc init(int32_t) {
      const __m256i z = _mm256_setzero_si256();
      return {{z, z}, z, z};
    }
    static LW_INLINE void step(Acc& acc, U8x64 w, const uint8_t* x4) {
      const __m256i x = broadcast4(reinterpret_cast<const int8_t*>(x4));
      add_maddubs(acc.lo, w.lo, x);
      add_maddubs(acc.hi, w.hi, x);
    }
    static LW_INLINE void flush(Acc& acc) {
      const __m256i ones = _mm256_set1_epi16(1);
      acc.sum.lo = _mm256_add_epi32(acc.sum.lo, _mm256_madd_epi16(acc.lo, ones));
      acc.sum.hi = _mm256_add_epi32(acc.sum.hi, _mm256_madd_epi16(acc.hi, ones));
      acc.lo = acc.hi = _mm256_setzero_si256();
    }
    static LW_INLINE I32x16 finish(const Acc& acc, int32_t sumx) {
      return subtract_zero<ZeroPoint>(acc.sum, sumx);
    }
  };
  template <int MaxCode>
  struct PanelDot<128, MaxCode, false> {
    static constexpr int kBlockBytes = 128, kXBytes = 8, kSteps = 1 << 30;
    struct Acc {
      I32x16 sum;
    };
    static LW_INLINE void prepare(uint8_t* p, U8x64 w) {
      const __m256i flip = _mm256_set1_epi8(-128);
      const __m256i lo = _mm256_xor_si256(w.lo, flip), hi = _mm256_xor_si256(w.hi, flip);
      store256(p, _mm256_srai_epi16(_mm256_slli_epi16(lo, 8), 8));
      store256(p + 32, _mm256_srai_epi16(_mm256_slli_epi16(hi, 8), 8));
      store256(p + 64, _mm256_srai_epi16(lo, 8));
      store256(p + 96, _mm256_srai_epi16(hi, 8));
    }
    // int8 0123 -> int16 0213, 32 bytes at a time (`bytes` is a multiple of 32).
    static LW_INLINE void prepare_x(uint8_t* p, const int8_t* q, int64_t bytes) {
      for (int64_t i = 0; i < bytes; i += 32) {
        const __m256i x = load256(q + i);
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
        const __m256i odd = _mm256_srai_epi16(x, 8);
        const __m256i a = _mm256_unpacklo_epi32(even, odd), b = _mm256_unpackhi_epi32(even, odd);
        store256(p + 2 * i, _mm256_permute2x128_si256(a, b, 0x20));
        store256(p + 2 * i + 32, _mm256_permute2x128_si256(a, b, 0x31));
      }
    }
    static LW_INLINE Acc init(int32_t) { return {set1_i32(0)}; }
    static LW_INLINE void step(Acc& acc, U8x64 w, const uint8_t* x2) {
      const __m256i x = broadcast4(reinterpret_cast<const int8_t*>(x2));
      add_madd(acc.sum.lo, w.lo, x);
      add_madd(acc.sum.hi, w.hi, x);
    }
    static LW_INLINE void flush(Acc&) {}
    static LW_INLINE I32x16 finish(const Acc& acc, int32_t) { return acc.sum; }
  };

  static LW_INLINE U8x64 to_u8(F32x16 a, F32x16 b, F32x16 c, F32x16 d) {
    const I32x16 i = to_i32(a), j = to_i32(b), k = to_i32(c), l = to_i32(d);
    return {_mm256_packus_epi16(_mm256_packs_epi32(i.lo, j.lo), _mm256_packs_epi32(k.lo, l.lo)),
            _mm256_packus_epi16(_mm256_packs_epi32(i.hi, j.hi), _mm256_packs_epi32(k.hi, l.hi))};
  }
  // Sums of two products are at most 2 * 128 * 127 < 2^15.
  static LW_INLINE I32x16 add_products(I32x16 sum, const uint8_t* four, U8x64 codes) {
    const __m256i w = broadcast4(reinterpret_cast<const int8_t*>(four));
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(_mm256_maddubs_epi16(w, codes.lo), ones)),
            _mm256_add_epi32(sum.hi, _mm256_madd_epi16(_mm256_maddubs_epi16(w, codes.hi), ones))};
  }
  static constexpr int kFloatSums = 4;  // that keep the multipliers busy and fit the registers
  // Rows and strips that the inner loop of a panel takes at once.
  static constexpr int kPanelRows = 4, kPanelStrips = 1;
  // Up to so many rows gemv is faster than gemm: codes above 31, codes up to 31, floats.
  static constexpr int kGemvWide = 8, kGemvNarrow = 3, kGemvFloat = 5;
  // Rows that gemv is instantiated for, so that a machine may choose (_C.set_gemv_rows).
  static constexpr int kGemvMost = kRowBlock;
  // Attention: sums in registers at once, and queries of a batch when there are many.
  static constexpr int kAttentionSums = 4, kAttentionBatch = 6;
  // Strips that gemv reads side by side.
  static constexpr int kGemvStreams = 4;
  // Many rows and strips that keep columns: gemm is as good, since codes of 8 bits want i16 here.
  static constexpr bool kColumnGemm = false;
  // Prefetching by software: no, it takes from what several streams reach (Zen 3: a quarter).
  static constexpr bool kPrefetch = false;
  static constexpr int kGemvBlock = 4;  // rows whose integer sums fit the registers

  // ---- below: private to this header
  static LW_INLINE __m256i load256(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static LW_INLINE void store256(void* p, __m256i v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  }
  static LW_INLINE __m256i broadcast4(const int8_t* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
  }
  // Rounded to even at bf16's last bit, which is moved to bit 0; a NaN stays one.
  static LW_INLINE __m256i round_bf16(__m256 a) {
    const __m256i u = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    return _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, _mm256_castps_si256(nan)), 16);
  }
  // Multiply, then add in place. As intrinsics GCC 12 sums the products of several steps before it
  // adds them, spills, and copies every accumulator once per step.
  static LW_INLINE void add_maddubs(__m256i& acc, __m256i w, __m256i x) {
    __m256i pairs;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
            : "+x"(acc), "=&x"(pairs)
            : "x"(w), "x"(x));
  }
  static LW_INLINE void add_madd(__m256i& acc, __m256i w, __m256i x) {
    __m256i pairs;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(pairs) : "x"(w), "x"(x));
  }
  template <int ZeroPoint>
  static LW_INLINE I32x16 subtract_zero(I32x16 a, int32_t sumx) {
    if constexpr (ZeroPoint == 0) return a;
    const __m256i z = _mm256_set1_epi32(ZeroPoint * sumx);
    return {_mm256_sub_epi32(a.lo, z), _mm256_sub_epi32(a.hi, z)};
  }
  // Lanes 0..n-1 of 8 (n may be out of 0..8).
  static LW_INLINE __m256i first(int64_t n) {
    const int c = n < 0 ? 0 : n > 8 ? 8 : static_cast<int>(n);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(c), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  // Bit i of m -> byte i all ones.
  static LW_INLINE __m256i spread(uint32_t m) {
    const __m256i which = _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101,
                                             0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(m)), which);
    return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
  }
  // 3a / 4: its upper two bits are 3a / 256. Averages round up, hence 1 less before.
  static LW_INLINE __m256i three_quarters(__m256i a) {
    a = _mm256_subs_epu8(a, _mm256_set1_epi8(1));
    return _mm256_avg_epu8(a, _mm256_avg_epu8(a, _mm256_setzero_si256()));
  }
  // Expansion by vpshufb, 16 bytes at a time. Codes are xor-ed with `fill` on both sides of the
  // shuffle, because what the shuffle leaves out is zero. (pdep costs as many uops and a trip
  // through memory.)
  template <int At, class Cut>
  static LW_INLINE __m128i expand16(uint64_t mask, const uint8_t*& p, __m128i fill, Cut cut) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i order =
        _mm_add_epi8(entry<At>(kExpand.first, mask), entry<At + 8>(kExpand.second, mask));
    p += _mm_popcnt_u64(mask << (48 - At) >> 48);
    return _mm_shuffle_epi8(_mm_xor_si128(cut(codes), fill), order);
  }
  // The 8 values of two bytes whose bits begin at bit `At` of the mask.
  template <int At>
  static LW_INLINE __m128i expand8_u16(uint32_t mask, const uint8_t* p) {
    const auto before = At ? _mm_popcnt_u32(mask << (32 - (At ? At : 1))) : 0;
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * before));
    const uint8_t* order = kExpand16.order[mask >> At & 0xff];
    return _mm_shuffle_epi8(values, _mm_load_si128(reinterpret_cast<const __m128i*>(order)));
  }
  // 8 outputs of a bitmap with two bits in every four. Their codes, two each, lie in the first 8
  // bytes of either half of `codes`. The four bits of an output choose its shuffle among 16, eight
  // of them in a register.
  static LW_INLINE __m256i expand8_24(const uint8_t* bitmap, __m256i codes) {
    constexpr int kNone = static_cast<int>(0x80808080);
    const __m256i low =
        _mm256_setr_epi32(kNone, kNone, kNone, word24(3), kNone, word24(5), word24(6), kNone);
    const __m256i high =
        _mm256_setr_epi32(kNone, word24(9), word24(10), kNone, word24(12), kNone, kNone, kNone);
    int32_t mask;
    __builtin_memcpy(&mask, bitmap, 4);
    const __m256i bits =
        _mm256_srlv_epi32(_mm256_set1_epi32(mask), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const __m256i four = _mm256_slli_epi32(bits, 28);  // the fourth bit is the sign
    const __m256i order = _mm256_castps_si256(_mm256_blendv_ps(
        _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(low, bits)),
        _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(high, bits)), _mm256_castsi256_ps(four)));
    const __m256i first = _mm256_setr_epi32(0, 0x02020202, 0x04040404, 0x06060606, 0, 0x02020202,
                                            0x04040404, 0x06060606);
    return _mm256_shuffle_epi8(codes, _mm256_add_epi8(order, first));
  }
  // Shuffle of the four inputs of one output: 0 and 1 at the bits that are set.
  static constexpr int word24(int bits) {
    uint32_t word = 0x80808080;
    int next = 0;
    for (int i = 0; i < 4; ++i)
      if (bits >> i & 1) word = (word & ~(0xffu << 8 * i)) | static_cast<uint32_t>(next++) << 8 * i;
    return static_cast<int>(word);
  }
  // Entry of the byte at bit `At` of the mask.
  template <int At>
  static LW_INLINE __m128i entry(const uint8_t (*table)[16], uint64_t mask) {
    const uint64_t offset = (At ? mask >> (At - 4) : mask << 4) & 0xff0;
    return _mm_load_si128(reinterpret_cast<const __m128i*>(table[0] + offset));
  }
  template <class Cut>
  static LW_INLINE U8x64 expand_cut(uint8_t fill, const uint8_t* bitmap, const uint8_t*& p,
                                    Cut cut) {
    uint64_t mask;
    __builtin_memcpy(&mask, bitmap, 8);
    const __m128i f = _mm_set1_epi8(static_cast<char>(fill));
    const __m128i a = expand16<0>(mask, p, f, cut), b = expand16<16>(mask, p, f, cut);
    const __m128i c = expand16<32>(mask, p, f, cut), d = expand16<48>(mask, p, f, cut);
    const __m256i whole = _mm256_set1_epi8(static_cast<char>(fill));
    return {_mm256_xor_si256(_mm256_set_m128i(b, a), whole),
            _mm256_xor_si256(_mm256_set_m128i(d, c), whole)};
  }
};

}  // namespace
}  // namespace lacewing
