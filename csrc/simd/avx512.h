// The vocabulary in AVX-512 F, BW, DQ, VL, VNNI, VBMI, VBMI2. A block of 64 bytes is one register.
#pragma once

#include <immintrin.h>

#include "core/inline.h"
#include "core/types.h"
#include "simd/four.h"

namespace lacewing {
namespace {

// The last four of the five base-3 digits of a / 256, two bits each.
struct TritTable {
  uint8_t last[256];
};
constexpr TritTable make_trit_table() {
  TritTable t{};
  for (int a = 0; a < 256; ++a) {
    int rest = 3 * a & 255, digits = 0;
    for (int j = 0; j < 4; ++j) {
      digits |= (3 * rest >> 8) << 2 * j;
      rest = 3 * rest & 255;
    }
    t.last[a] = static_cast<uint8_t>(digits);
  }
  return t;
}
alignas(64) constexpr TritTable kTrits = make_trit_table();

struct Avx512 {
  static constexpr const char* kName = "avx512";

  using F32x16 = __m512;
  struct I32x16 {
    __m512i v;
  };
  struct U8x64 {
    __m512i v;
  };

  // ---- f32
  static LW_INLINE F32x16 zero() { return _mm512_setzero_ps(); }
  static LW_INLINE F32x16 set1(float x) { return _mm512_set1_ps(x); }
  static LW_INLINE F32x16 load(const float* p) { return _mm512_loadu_ps(p); }
  static LW_INLINE void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a); }
  static LW_INLINE F32x16 load_n(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(first(n), p);
  }
  static LW_INLINE void store_n(float* p, F32x16 a, int64_t n) {
    _mm512_mask_storeu_ps(p, first(n), a);
  }
  static LW_INLINE F32x16 add(F32x16 a, F32x16 b) { return _mm512_add_ps(a, b); }
  static LW_INLINE F32x16 sub(F32x16 a, F32x16 b) { return _mm512_sub_ps(a, b); }
  static LW_INLINE F32x16 mul(F32x16 a, F32x16 b) { return _mm512_mul_ps(a, b); }
  static LW_INLINE F32x16 div(F32x16 a, F32x16 b) { return _mm512_div_ps(a, b); }
  static LW_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a, b, c); }
  static LW_INLINE F32x16 max(F32x16 a, F32x16 b) { return _mm512_max_ps(a, b); }
  static LW_INLINE F32x16 min(F32x16 a, F32x16 b) { return _mm512_min_ps(a, b); }
  static LW_INLINE F32x16 abs(F32x16 a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
  static LW_INLINE F32x16 neg(F32x16 a) { return _mm512_xor_ps(_mm512_set1_ps(-0.0f), a); }
  static LW_INLINE F32x16 round_even(F32x16 a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static LW_INLINE F32x16 sqrt(F32x16 a) { return _mm512_sqrt_ps(a); }
  static LW_INLINE float sum(F32x16 a) {
    const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
  }
  static LW_INLINE float hmax(F32x16 a) {
    const __m256 s8 = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_max_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
  }
  static LW_INLINE void sum_rows(float* to, const float* rows) { reduce_rows(to, rows, add); }
  static LW_INLINE void hmax_rows(float* to, const float* rows) { reduce_rows(to, rows, max); }
  static LW_INLINE F32x16 select_gt(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
  }
  static LW_INLINE F32x16 from_i32(I32x16 a) { return _mm512_cvtepi32_ps(a.v); }
  static LW_INLINE I32x16 to_i32(F32x16 a) { return {_mm512_cvtps_epi32(a)}; }
  static LW_INLINE F32x16 load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static LW_INLINE void store_f16(uint16_t* p, F32x16 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static LW_INLINE F32x16 load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  // Nearest even, a NaN stays one. Not vcvtneps2bf16, which makes zeros of subnormals.
  static LW_INLINE void store_bf16(uint16_t* p, F32x16 a) {
    const __m512i u = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i bits = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), u,
                                              _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
  static LW_INLINE F32x16 pow2(I32x16 e) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(e.v, _mm512_set1_epi32(127)), 23));
  }
  static LW_INLINE F32x16 scale2(F32x16 p, F32x16 n) { return _mm512_scalef_ps(p, n); }

  // ---- i32
  static LW_INLINE I32x16 set1_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static LW_INLINE I32x16 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  static LW_INLINE void store_i32(int32_t* p, I32x16 a) { _mm512_storeu_si512(p, a.v); }
  static LW_INLINE I32x16 add_i32(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
  static LW_INLINE I32x16 max_i32(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
  static LW_INLINE void store_i8(int8_t* p, I32x16 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
  }
  static LW_INLINE int32_t sum_i32(I32x16 a) {
    const __m256i s8 =
        _mm256_add_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
    const __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
    const __m128i s2 = _mm_add_epi32(s4, _mm_shuffle_epi32(s4, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s2, _mm_shuffle_epi32(s2, 0xb1)));
  }

  // ---- u8
  static LW_INLINE U8x64 load_u8(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  static LW_INLINE void store_u8(uint8_t* p, U8x64 a) { _mm512_storeu_si512(p, a.v); }
  static LW_INLINE U8x64 and_u8(U8x64 a, uint8_t c) { return {_mm512_and_si512(a.v, set1_u8(c))}; }
  static LW_INLINE U8x64 shr4_u8(U8x64 a) {
    return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), set1_u8(15))};
  }
  static LW_INLINE U8x64 or_u8(U8x64 a, U8x64 b) { return {_mm512_or_si512(a.v, b.v)}; }
  template <int Shift>
  static LW_INLINE U8x64 shift_and(U8x64 a, uint8_t mask) {
    if constexpr (Shift == 0) return and_u8(a, mask);
    if constexpr (Shift < 0) return and_u8({_mm512_slli_epi16(a.v, -Shift)}, mask);
    return and_u8({_mm512_srli_epi16(a.v, Shift)}, mask);
  }
  // The first digit as in avx2.h, the others from the table.
  static LW_INLINE void trits(U8x64 a, U8x64 (&digits)[5]) {
    const __m512i less = _mm512_subs_epu8(a.v, set1_u8(1));
    const __m512i half = _mm512_avg_epu8(less, _mm512_setzero_si512());
    digits[0] = shift_and<6>({_mm512_avg_epu8(less, half)}, 3);
    const __m512i* table = reinterpret_cast<const __m512i*>(kTrits.last);
    const __m512i low = _mm512_permutex2var_epi8(table[0], a.v, table[1]);
    const __m512i high = _mm512_permutex2var_epi8(table[2], a.v, table[3]);
    const U8x64 last = {_mm512_mask_blend_epi8(_mm512_movepi8_mask(a.v), low, high)};
    digits[1] = shift_and<0>(last, 3);
    digits[2] = shift_and<2>(last, 3);
    digits[3] = shift_and<4>(last, 3);
    digits[4] = shift_and<6>(last, 3);
  }
  static LW_INLINE U8x64 or_mask(U8x64 a, uint64_t mask, uint8_t value) {
    return {_mm512_or_si512(a.v, _mm512_maskz_mov_epi8(mask, set1_u8(value)))};
  }
  static LW_INLINE U8x64 expand(uint8_t fill, const uint8_t* bitmap, const uint8_t*& p) {
    return expand_codes(fill, bitmap, p, load_u8(p));
  }
  static LW_INLINE U8x64 expand_lo4(uint8_t fill, const uint8_t* bitmap, const uint8_t*& p) {
    return expand_codes(fill, bitmap, p, and_u8(load_u8(p), 15));
  }
  static LW_INLINE U8x64 expand_hi4(uint8_t fill, const uint8_t* bitmap, const uint8_t*& p) {
    return expand_codes(fill, bitmap, p, shr4_u8(load_u8(p)));
  }
  static LW_INLINE U8x64 expand_u16(const uint8_t* bitmap, const uint8_t*& p) {
    uint32_t mask;
    __builtin_memcpy(&mask, bitmap, 4);
    // Onto a register of zeros, which the compiler must not see through: the zeroing form waits for
    // the old value of its destination on Zen 4 (5 cycles instead of 2; bf16_sp, one
    // thread: 1.48x).
    __m512i zeros = _mm512_setzero_si512();
    __asm__("" : "+v"(zeros));
    const __m512i v = _mm512_mask_expand_epi16(zeros, mask, _mm512_loadu_si512(p));
    p += 2 * _mm_popcnt_u32(mask);
    return {v};
  }
  static LW_INLINE U8x64 expand_24(uint8_t fill, const uint8_t* bitmap, U8x64 codes) {
    uint64_t mask;
    __builtin_memcpy(&mask, bitmap, 8);
    return {_mm512_mask_expand_epi8(set1_u8(fill), mask, codes.v)};
  }
  static LW_INLINE U8x64 expand_lanes(uint8_t fill, int pattern, const uint8_t* first,
                                      const uint8_t* last, int at) {
    const __m512i next =
        _mm512_shrdv_epi32(load_u8(first).v, load_u8(last).v, _mm512_set1_epi32(8 * at));
    const __m128i* order = reinterpret_cast<const __m128i*>(kFour.order[pattern]);
    const __m512i lanes = _mm512_shuffle_epi8(next, _mm512_broadcast_i32x4(_mm_load_si128(order)));
    const __m512i absent = _mm512_set1_epi32(static_cast<int>(kFour.absent[pattern]));
    return {_mm512_ternarylogic_epi32(lanes, absent, set1_u8(fill), 0xf8)};  // a | (b & c)
  }
  // In a register: to memory the instruction is microcoded on Zen 4, 20 times as slow.
  static LW_INLINE int64_t compress(int8_t* to, uint64_t mask, const int8_t* from) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi8(mask, _mm512_loadu_si512(from)));
    return _mm_popcnt_u64(mask);
  }
  static LW_INLINE I32x16 add_i8(I32x16 a, U8x64 bytes) {
    return {_mm512_dpbusd_epi32(a.v, set1_u8(1), bytes.v)};
  }
  static LW_INLINE F32x16 bf16_even(U8x64 a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16));
  }
  static LW_INLINE F32x16 bf16_odd(U8x64 a) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }

  static LW_INLINE F32x16 floats_of_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  // ---- u8 as i16 [32]
  static LW_INLINE U8x64 set1_i16(int16_t x) { return {_mm512_set1_epi16(x)}; }
  static LW_INLINE U8x64 mul_i16(U8x64 a, U8x64 b) { return {_mm512_mulhrs_epi16(a.v, b.v)}; }
  static LW_INLINE U8x64 abs_i16(U8x64 a) { return {_mm512_abs_epi16(a.v)}; }
  static LW_INLINE U8x64 max_i16(U8x64 a, U8x64 b) { return {_mm512_max_epi16(a.v, b.v)}; }
  static LW_INLINE int width_i16(U8x64 a) {
    const __m256i s8 =
        _mm256_or_si256(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
    const __m128i s4 = _mm_or_si128(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
    const __m128i s2 = _mm_or_si128(s4, _mm_unpackhi_epi64(s4, s4));
    const auto all = static_cast<uint64_t>(_mm_cvtsi128_si64(s2));
    const uint64_t half = all | all >> 32;
    return 32 - static_cast<int>(_lzcnt_u32(static_cast<uint16_t>(half | half >> 16)));
  }
  // Packing works per 128 bits: put the quarters of the registers in order afterwards.
  static LW_INLINE U8x64 join_i16(U8x64 a, U8x64 b) {
    return {_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7),
                                     _mm512_packs_epi16(a.v, b.v))};
  }

  // ---- what gemm_columns asks for beyond that
  static LW_INLINE void split_rows(int8_t* to, int64_t stride, const int8_t* from) {
    // [2][8 rows][4 inputs]: bytes of 4 rows x 4 inputs transposed, then dwords to [8 inputs][2].
    const __m512i order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i dwords = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    alignas(64) uint8_t runs[64];
    store_u8(runs, {_mm512_permutexvar_epi32(
                       dwords, _mm512_shuffle_epi8(_mm512_loadu_si512(from), order))});
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) __builtin_memcpy(to + i * stride, runs + 8 * i, 8);
  }
  static LW_INLINE void join_rows(U8x64 (&to)[4], const int8_t* a, const int8_t* b, const int8_t* c,
                                  const int8_t* d) {
    const __m512i va = _mm512_loadu_si512(a), vb = _mm512_loadu_si512(b);
    const __m512i vc = _mm512_loadu_si512(c), vd = _mm512_loadu_si512(d);
    const __m512i ab0 = _mm512_unpacklo_epi8(va, vb), ab1 = _mm512_unpackhi_epi8(va, vb);
    const __m512i cd0 = _mm512_unpacklo_epi8(vc, vd), cd1 = _mm512_unpackhi_epi8(vc, vd);
    to[0] = {_mm512_unpacklo_epi16(ab0, cd0)};
    to[1] = {_mm512_unpackhi_epi16(ab0, cd0)};
    to[2] = {_mm512_unpacklo_epi16(ab1, cd1)};
    to[3] = {_mm512_unpackhi_epi16(ab1, cd1)};
  }
  static constexpr int joined_row(int r) { return r / 4 % 4 * 16 + r / 16 * 4 + r % 4; }

  // ---- what the AMX driver asks for beyond that
  static LW_INLINE U8x64 sub_u8(U8x64 a, uint8_t c) { return {_mm512_sub_epi8(a.v, set1_u8(c))}; }
  static LW_INLINE I32x16 bits_i32(F32x16 a) { return {_mm512_castps_si512(a)}; }
  static LW_INLINE U8x64 join_bf16(F32x16 even, F32x16 odd) {
    return {_mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16),
                            _mm512_castps_si512(odd))};
  }
  // Within pairs of registers first (4 dwords of each of 4 rows), then 4 x 4 runs of 16 bytes.
  static LW_INLINE void transpose_16x8(uint8_t* to, const uint8_t* from) {
    const __m512i lower =
        _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(4));
    __m512i runs[2][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i a = load_u8(from + 128 * i).v, b = load_u8(from + 128 * i + 64).v;
      runs[0][i] = _mm512_permutex2var_epi32(a, lower, b);
      runs[1][i] = _mm512_permutex2var_epi32(a, upper, b);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i* v = runs[half];
      const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44);
      const __m512i b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
      const __m512i c = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
      const __m512i d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
      store_u8(to, {_mm512_shuffle_i32x4(a, b, 0x88)});
      store_u8(to + 64, {_mm512_shuffle_i32x4(a, b, 0xdd)});
      store_u8(to + 128, {_mm512_shuffle_i32x4(c, d, 0x88)});
      store_u8(to + 192, {_mm512_shuffle_i32x4(c, d, 0xdd)});
      to += 256;
    }
  }

  static LW_INLINE void prefetch_t0(const void* p) { __builtin_prefetch(p, 0, 3); }
  static LW_INLINE void prefetch_t1(const void* p) { __builtin_prefetch(p, 0, 2); }

  // vpdpbusd on unsigned codes, started at -ZeroPoint * sum(q).
  template <int ZeroPoint, int MaxCode>
  struct Dot {
    struct Acc {
      I32x16 sum;
    };
    static LW_INLINE Acc init(int32_t sumx) { return {set1_i32(-ZeroPoint * sumx)}; }
    static LW_INLINE void step(Acc& acc, U8x64 w, const int8_t* x4) {
      acc.sum.v = _mm512_dpbusd_epi32(acc.sum.v, w.v, broadcast4(x4));
    }
    static LW_INLINE I32x16 finish(Acc acc, int32_t) { return acc.sum; }
    static LW_INLINE void step_by(I32x16& sum, const uint8_t* w4, U8x64 x) {
      const __m512i w = broadcast4(reinterpret_cast<const int8_t*>(w4));
      sum.v = _mm512_dpbusd_epi32(sum.v, w, x.v);
    }
  };

  // Many rows: blocks as they are.
  template <int ZeroPoint, int MaxCode>
  struct PanelDot : Dot<ZeroPoint, MaxCode> {
    using Acc = typename Dot<ZeroPoint, MaxCode>::Acc;
    static constexpr int kBlockBytes = 64, kXBytes = 4, kSteps = 1 << 30;
    static LW_INLINE void prepare(uint8_t* p, U8x64 w) { store_u8(p, w); }
    static LW_INLINE void prepare_x(uint8_t*, const int8_t*, int64_t) {}
    static LW_INLINE void step(Acc& acc, U8x64 w, const uint8_t* x) {
      Dot<ZeroPoint, MaxCode>::step(acc, w, reinterpret_cast<const int8_t*>(x));
    }
    static LW_INLINE void flush(Acc&) {}
  };

  static LW_INLINE U8x64 to_u8(F32x16 a, F32x16 b, F32x16 c, F32x16 d) {
    return {_mm512_packus_epi16(_mm512_packs_epi32(to_i32(a).v, to_i32(b).v),
                                _mm512_packs_epi32(to_i32(c).v, to_i32(d).v))};
  }
  static LW_INLINE I32x16 add_products(I32x16 sum, const uint8_t* four, U8x64 codes) {
    const __m512i w = broadcast4(reinterpret_cast<const int8_t*>(four));
    return {_mm512_dpbusd_epi32(sum.v, w, codes.v)};
  }
  static constexpr int kFloatSums = 12;  // that keep the multipliers busy and fit the registers
  // Rows and strips that the inner loop of a panel takes at once: 16 sums, 2 blocks, 1 activation.
  static constexpr int kPanelRows = 8, kPanelStrips = 2;
  // Up to so many rows gemv is faster than gemm: codes above 31, codes up to 31, floats.
  static constexpr int kGemvWide = 8, kGemvNarrow = 8, kGemvFloat = 8;
  // Rows that gemv is instantiated for, so that a machine may choose (_C.set_gemv_rows).
  static constexpr int kGemvMost = kRowBlock;
  // Attention: sums in registers at once, and queries of a batch when there are many.
  static constexpr int kAttentionSums = 24, kAttentionBatch = 12;
  // Strips that gemv reads side by side.
  static constexpr int kGemvStreams = 1;
  // Whether many rows of activations go to the columns that a strip keeps (gemm_columns.h).
  static constexpr bool kColumnGemm = true;
  // Prefetching by software: yes, one stream of a sparse format is half as fast without.
  static constexpr bool kPrefetch = true;
  static constexpr int kGemvBlock = 8;  // rows whose integer sums fit the registers

  // ---- below: private to this header
  // Halves of the rows first, then quarters, of two rows at a time.
  template <class F>
  static LW_INLINE void reduce_rows(float* to, const float* rows, F f) {
    const auto halves = [=](int r) __attribute__((always_inline)) {
      const __m512 a = load(rows + 16 * r), b = load(rows + 16 * r + 16);
      return f(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const auto fours = [=](int r) __attribute__((always_inline)) {
      const __m512 a = halves(r), b = halves(r + 2);
      return f(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    const __m512 a = fours(0), b = fours(4);
    const __m512 twos = f(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const __m512 ones = f(_mm512_shuffle_ps(twos, twos, 0x88), _mm512_shuffle_ps(twos, twos, 0xdd));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, ones)));
  }
  static LW_INLINE __m512i set1_u8(uint8_t c) { return _mm512_set1_epi8(static_cast<char>(c)); }
  static LW_INLINE U8x64 expand_codes(uint8_t fill, const uint8_t* bitmap, const uint8_t*& p,
                                      U8x64 codes) {
    uint64_t mask;
    __builtin_memcpy(&mask, bitmap, 8);
    p += _mm_popcnt_u64(mask);
    return {_mm512_mask_expand_epi8(set1_u8(fill), mask, codes.v)};
  }
  static LW_INLINE __m512i broadcast4(const int8_t* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }
  static LW_INLINE __mmask16 first(int64_t n) {
    return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
  }
};

}  // namespace
}  // namespace lacewing
