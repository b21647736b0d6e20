// Every kernel of every table against the scalar one, bit for bit, on the same pseudo-random data.
// Inputs end where memory ends (a read too far is a fault), outputs lie between canaries.
// Needs no C library, so that it also runs without an operating system.
#include <initializer_list>

#include "core/rows.h"
#include "ops/limits.h"
#include "platform.h"

extern "C" int memcmp(const void*, const void*, size_t);
extern "C" void* memcpy(void*, const void*, size_t);

namespace lacewing::test {
namespace {

// ---- numbers

uint64_t state = 1;

uint64_t random64() {  // splitmix64
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

uint32_t below(uint32_t n) { return static_cast<uint32_t>((random64() >> 32) * n >> 32); }

float bits_to_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// Any sign and mantissa, exponents 2^lo..2^hi.
float random_float(int lo, int hi) {
  const uint32_t exponent = 127 + lo + below(hi - lo + 1);
  return bits_to_float((below(2) << 31) | exponent << 23 | below(1 << 23));
}

// Finite; one of 16 is subnormal or zero.
uint16_t random_f16() {
  const uint32_t exponent = below(16) ? 8 + below(9) : 0;
  return static_cast<uint16_t>(below(2) << 15 | exponent << 10 | below(1 << 10));
}

// ---- output

int passed = 0, failed = 0;

void print_number(int64_t n) {
  char text[24];
  char* p = text + sizeof(text) - 1;
  *p = 0;
  const bool negative = n < 0;
  if (negative) n = -n;
  do *--p = static_cast<char>('0' + n % 10);
  while (n /= 10);
  if (negative) *--p = '-';
  print(p);
}

// Name and values of what is being compared, for the message of a difference.
struct Case {
  const char* isa;
  const char* what;
  const char* format;
  int64_t values[6];
};

void compare(const Case& c, const void* expected, const void* actual, size_t bytes) {
  if (memcmp(expected, actual, bytes) == 0) {
    ++passed;
    return;
  }
  if (++failed > 40) return;
  auto* x = static_cast<const uint8_t*>(expected);
  auto* y = static_cast<const uint8_t*>(actual);
  size_t at = 0;
  while (x[at] == y[at]) ++at;
  print("DIFFERS ");
  print(c.isa);
  print(" ");
  print(c.what);
  print(" ");
  print(c.format);
  for (int64_t v : c.values) {
    print(" ");
    print_number(v);
  }
  print(": byte ");
  print_number(static_cast<int64_t>(at));
  print(" of ");
  print_number(static_cast<int64_t>(bytes));
  print("\n");
}

// ---- memory: one slot per role; results of the scalar table in kExpected, of another in kActual

enum Slot { kPart0, kPart1, kX, kRowsA, kRowsB, kBias, kScratch, kExpected, kActual, kA, kB, kC };

template <class T>
T* slot(Slot s, int64_t count) {
  return reinterpret_cast<T*>(guarded(s, static_cast<size_t>(count) * sizeof(T)));
}

void fill_floats(float* p, int64_t count, int lo, int hi) {
  for (int64_t i = 0; i < count; ++i) p[i] = random_float(lo, hi);
}

constexpr uint32_t kCanary = 0x7fc1a2b3;  // a NaN: arithmetic with it would show too

float* canaries(Slot s, int64_t count) {
  auto* p = slot<uint32_t>(s, count);
  for (int64_t i = 0; i < count; ++i) p[i] = kCanary;
  return reinterpret_cast<float*>(p);
}

// Runs f(table, output) for the scalar table and each other one; compares `floats` outputs.
template <class F>
void each(const KernelTable* const* tables, int count, const char* what, Case c, int64_t floats,
          F f) {
  f(*tables[0], canaries(kExpected, floats));
  for (int i = 1; i < count; ++i) {
    f(*tables[i], canaries(kActual, floats));
    c.isa = tables[i]->isa;
    c.what = what;
    compare(c, slot<float>(kExpected, floats), slot<float>(kActual, floats),
            static_cast<size_t>(floats) * 4);
  }
}

// ---- weights

void random_scales(uint8_t* p, int count) {
  for (int i = 0; i < count; ++i) {
    const uint16_t h = random_f16();
    __builtin_memcpy(p + 2 * i, &h, 2);
  }
}

void random_bytes(uint8_t* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<uint8_t>(random64() >> 56);
}

void random_bf16(uint8_t* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = below(16) ? random_float(-8, 2) : 0.0f;
    __builtin_memcpy(p + 2 * i, reinterpret_cast<const uint8_t*>(&x) + 2, 2);
  }
}

bool same(const char* a, const char* b) {
  for (; *a && *a == *b; ++a) ++b;
  return *a == *b;
}

bool is_sparse(const FormatInfo& f) { return same(f.part_names[0], "stream"); }
bool in_blocks(const FormatInfo& f) { return same(f.name, "w8a8_b16x1"); }
bool has_minimum(const FormatInfo& f) { return f.name[6] == '2' && f.name[7] == 'z'; }
bool is_24(const FormatInfo& f) { return same(f.part_names[0], "records"); }
int bits_of(const FormatInfo& f) { return f.group == 0 ? 16 : f.name[1] - '0'; }  // bf16, w8, ..

uint64_t random_bitmap(int density) {  // 0..4 quarters of ones
  switch (density) {
    case 0:
      return 0;
    case 1:
      return random64() & random64();
    case 2:
      return random64();
    case 3:
      return random64() | random64();
    default:
      return ~uint64_t{0};
  }
}

// One record at p, if p is not null. Returns its length.
int64_t sparse_record(uint8_t* p, int bits, int density, uint64_t seed) {
  const uint64_t saved = state;
  state = seed;  // the same record whether it is measured or written
  const int scales = bits == 16 ? 0 : 32;
  int64_t counts[2] = {0, 0};
  for (int b = 0; b < 16; ++b) {
    const uint64_t bitmap = random_bitmap(density < 5 ? density : static_cast<int>(below(5)));
    counts[b / 8] += __builtin_popcountll(bitmap);
    if (p) __builtin_memcpy(p + scales + 8 * b, &bitmap, 8);
  }
  const int64_t more = counts[0] > counts[1] ? counts[0] : counts[1];
  const int64_t all = counts[0] + counts[1];
  const int64_t values = bits == 16 ? 2 * all : ((bits == 8 ? all : more) + 1) & ~int64_t{1};
  if (p && scales) random_scales(p, 16);
  uint8_t* at = p + scales + 128;
  if (p && bits == 16)
    random_bf16(at, all);
  else if (p)
    random_bytes(at, values);
  state = saved;
  return scales + 128 + values;
}

// As `sparse_record`, a whole strip of blocks of 16 outputs x 1 input.
int64_t block_strip(uint8_t* p, int64_t k, int density, uint64_t seed) {
  const uint64_t saved = state;
  state = seed;
  const int64_t k_pad = (k + 63) / 64 * 64, head = (32 + k_pad / 8 + 63) / 64 * 64;
  int64_t kept = 0;
  for (int64_t i = 0; i < k_pad; i += 64) {
    uint64_t bitmap = random_bitmap(density < 5 ? density : static_cast<int>(below(5)));
    if (k - i < 64) bitmap &= (uint64_t{1} << (k - i)) - 1;
    kept += __builtin_popcountll(bitmap);
    if (p) __builtin_memcpy(p + 32 + i / 8, &bitmap, 8);
  }
  const int64_t codes = (kept + 3) / 4 * 64;
  if (p) random_scales(p, 16);
  if (p) random_bytes(p + head, codes);
  state = saved;
  return head + codes;
}

// Strips of random records, or of blocks, twice: to know the size, then to write.
void sparse_weight(PackedTensor& w, const FormatInfo& f) {
  const int64_t groups = in_blocks(f) ? 0 : f.k_pad(w.k) / 64;  // records of a strip
  auto* offsets = slot<int64_t>(kPart1, w.strips() + 1);
  const uint64_t seed = random64();
  uint8_t* stream = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    int64_t at = 0, record = 0;
    for (int64_t s = 0; s < w.strips(); ++s) {
      offsets[s] = at;
      if (in_blocks(f))
        at += block_strip(stream ? stream + at : nullptr, w.k, static_cast<int>((seed + s) % 6),
                          seed ^ (s * 0x10001));
      for (int64_t g = 0; g < groups; ++g, ++record)
        at += sparse_record(stream ? stream + at : nullptr, bits_of(f),
                            static_cast<int>((seed + record) % 6), seed ^ (record * 0x10001));
      at = (at + 63) & ~int64_t{63};
    }
    offsets[w.strips()] = at;
    if (!stream) {
      stream = slot<uint8_t>(kPart0, at + 64);
      __builtin_memset(stream, 0, static_cast<size_t>(at + 64));
    }
    w.part_bytes[0] = static_cast<size_t>(at + 64);
  }
  w.parts[0] = stream;
  w.parts[1] = reinterpret_cast<uint8_t*>(offsets);
  w.part_bytes[1] = static_cast<size_t>(w.strips() + 1) * 8;
}

int64_t dense_code_bytes(const FormatInfo& f, int64_t inputs) {  // of a strip
  const int bits = bits_of(f);
  return bits == 1 ? 16 * inputs / 5 : 2 * bits * inputs;
}

void dense_weight(PackedTensor& w, const FormatInfo& f) {
  const int64_t k_pad = f.k_pad(w.k), groups = f.group == kRowGroup ? 1 : k_pad / f.group;
  const int64_t tiles = w.strips() * groups;
  const int64_t codes = w.strips() * dense_code_bytes(f, k_pad);
  const int halves = has_minimum(f) ? 32 : 16;
  auto* p = slot<uint8_t>(kPart0, codes);
  random_bytes(p, codes);
  auto* scales = slot<uint8_t>(kPart1, tiles * halves * 2);
  random_scales(scales, static_cast<int>(tiles * halves));
  w.parts[0] = p;
  w.parts[1] = scales;
  w.part_bytes[0] = static_cast<size_t>(codes);
  w.part_bytes[1] = static_cast<size_t>(tiles * halves * 2);
}

void float_weight(PackedTensor& w, const FormatInfo& f) {
  const int64_t count = w.strips() * f.k_pad(w.k) * 16;
  auto* p = slot<uint8_t>(kPart0, 2 * count);
  random_bf16(p, count);
  w.parts[0] = p;
  w.part_bytes[0] = static_cast<size_t>(count) * 2;
}

// Codes, 16 bitmaps with two bits in every four, scales.
void weight_24(PackedTensor& w, const FormatInfo& f) {
  const uint8_t pairs[] = {3, 5, 6, 9, 10, 12};
  const int64_t codes = bits_of(f) == 8 ? 512 : 256, record = codes + 128 + 32;
  const int64_t records = w.strips() * (f.k_pad(w.k) / 64);
  auto* p = slot<uint8_t>(kPart0, records * record);
  w.parts[0] = p;
  w.part_bytes[0] = static_cast<size_t>(records * record);
  for (int64_t i = 0; i < records; ++i, p += record) {
    random_bytes(p, codes);
    for (int j = 0; j < 128; ++j)
      p[codes + j] = static_cast<uint8_t>(pairs[below(6)] | pairs[below(6)] << 4);
    random_scales(p + codes + 128, 16);
  }
}

PackedTensor random_weight(int format, int64_t n, int64_t k) {
  PackedTensor w{format, n, k, {nullptr, nullptr}, {0, 0}};
  const FormatInfo& f = kFormatInfo[format];
  if (is_sparse(f))
    sparse_weight(w, f);
  else if (is_24(f))
    weight_24(w, f);
  else if (f.group == 0)
    float_weight(w, f);
  else
    dense_weight(w, f);
  if (const char* wrong = f.validate(w)) {
    print("INVALID ");
    print(f.name);
    print(": ");
    print(wrong);
    print("\n");
    ++failed;
  }
  return w;
}

// ---- linear, quantize_row, gather_rows

// Ordinary values, and per group sometimes: zeros, tiny ones, one large, halves (ties), a NaN-free
// mixture of magnitudes.
void random_activations(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += 32) {
    const uint32_t kind = below(8);
    for (int64_t j = i; j < count && j < i + 32; ++j) {
      float v = random_float(-6, 2);
      if (kind == 0) v = 0.0f;
      if (kind == 1) v = random_float(-126, -120);
      if (kind == 2) v = static_cast<float>(static_cast<int>(below(255)) - 127) * 0.5f;
      if (kind == 3 && j == i) v = 30000.0f;
      if (kind == 4) v = bits_to_float(below(1 << 20));  // subnormal
      x[j] = v;
    }
  }
}

Rows quantize(const KernelTable& t, int format, const float* x, int64_t m, int64_t k, Slot s) {
  const FormatInfo& f = kFormatInfo[format];
  const auto bytes = static_cast<int64_t>(rows_bytes(f, m, k));
  auto* memory = slot<uint8_t>(s, bytes);
  __builtin_memset(memory, 0xa5, static_cast<size_t>(bytes));
  const Rows rows = place_rows(f, m, k, memory);
  const int64_t groups = rows.group ? rows.k_pad / rows.group : (rows.k_pad + 63) / 64;
  for (int64_t r = 0; r < m; ++r) {
    const int64_t half = groups / 2;
    t.quantize_row(x + r * k, k, rows, r, 0, half);
    t.quantize_row(x + r * k, k, rows, r, half, groups);
  }
  return rows;
}

struct Shape {
  int64_t m, n, k;
};

// variant 0: all strips at once; 1: bias; 2: bias, onto y, in two halves; 3: bias, prefetching left
// to the CPU.
void linear(const KernelTable& t, const PackedTensor& w, const Rows& x, int variant, float* y) {
  const int64_t ldy = w.n + 5;
  const float* bias = variant ? slot<float>(kBias, w.n) : nullptr;
  if (variant == 2)
    for (int64_t r = 0; r < x.m; ++r) memcpy(y + r * ldy, bias, static_cast<size_t>(w.n) * 4);
  const int64_t middle = variant == 2 ? w.strips() / 2 : 0;
  void* scratch = slot<uint8_t>(kScratch, kLinearScratch);
  const Switch& prefetch = t.formats[w.format].cpu_prefetch;
  *prefetch.rows = variant == 3 ? prefetch.most : 0;
  const LinearArgs args{&w, &x, bias, y, ldy, variant == 2, 0, middle, scratch};
  LinearArgs rest = args;
  rest.strip_begin = middle;
  rest.strip_end = w.strips();
  if (middle) t.formats[w.format].linear(args);
  t.formats[w.format].linear(rest);
}

void gather(const KernelTable& t, const PackedTensor& w, float* out) {
  const int32_t ids[] = {0, static_cast<int32_t>(w.n - 1), static_cast<int32_t>(w.n / 2), 0};
  t.formats[w.format].gather_rows(w, ids, 4, out, w.k + 3);
}

void test_shape(const KernelTable* const* tables, int count, int format, const Shape& shape) {
  const FormatInfo& f = kFormatInfo[format];
  const auto [m, n, k] = shape;
  const PackedTensor w = random_weight(format, n, k);
  float* x = slot<float>(kX, m * k);
  random_activations(x, m * k);
  fill_floats(slot<float>(kBias, n), n, -3, 3);
  const Rows expected_rows = quantize(*tables[0], format, x, m, k, kRowsA);
  const size_t bytes = rows_bytes(f, m, k);
  for (int i = 1; i < count; ++i) {
    quantize(*tables[i], format, x, m, k, kRowsB);
    compare({tables[i]->isa, "quantize_row", f.name, {m, n, k}}, guarded(kRowsA, bytes),
            guarded(kRowsB, bytes), bytes);
  }
  // All rows are the scalar table's from here on: they are equal, or that was said.
  for (int variant = 0; variant < (m == 1 ? 4 : 3); ++variant)
    each(tables, count, "linear", {nullptr, nullptr, f.name, {m, n, k, variant}}, m * (n + 5),
         [&](const KernelTable& t, float* y) {
           // Floats in tiles have bits of their own, and a tolerance: tests/kernels. Here they only
           // have to stay inside their memory; then the scalar table answers for them.
           const bool own_bits = f.group == 0 && t.isa[0] == 'a' && t.isa[1] == 'm';
           linear(t, w, expected_rows, variant, y);
           if (own_bits) linear(*tables[0], w, expected_rows, variant, y);
         });
  if (m == 1)
    each(tables, count, "gather_rows", {nullptr, nullptr, f.name, {n, k}}, 4 * (k + 3),
         [&](const KernelTable& t, float* y) { gather(t, w, y); });
}

void test_format(const KernelTable* const* tables, int count, int format) {
  const FormatInfo& f = kFormatInfo[format];
  const int64_t group = f.k_pad(1);  // or what the rows of one scale are padded to
  const int64_t ks[] = {group, 3 * group, 576, 205};
  for (int64_t m : {1, 2, 3, 8, 9, 17, 33})
    for (int64_t n : {1, 16, 17, 48, 50})
      for (int64_t k : ks) test_shape(tables, count, format, {m, n, k});
  // More than one panel of rows, of strips and of depth.
  test_shape(tables, count, format, {150, 144, 1100});
}

// ---- the other kernels

void test_rows(const KernelTable* const* tables, int count, int64_t n) {
  const Case c{nullptr, nullptr, "", {n}};
  const auto bytes = static_cast<size_t>(n) * 4;
  float* a = slot<float>(kA, n);
  float* b = slot<float>(kB, n);
  fill_floats(a, n, -20, 7);
  fill_floats(b, n, -20, 7);
  each(tables, count, "rms_scale", c, 1,
       [&](const KernelTable& t, float* y) { *y = t.rms_scale(a, n, 1e-5f); });
  each(tables, count, "scale_mul", c, n,
       [&](const KernelTable& t, float* y) { t.scale_mul(a, 0.37f, b, n, y); });
  each(tables, count, "add", c, n, [&](const KernelTable& t, float* y) {
    memcpy(y, b, bytes);
    t.add(a, n, y);
  });
  each(tables, count, "scale", c, n, [&](const KernelTable& t, float* y) {
    memcpy(y, b, bytes);
    t.scale(-1.7f, n, y);
  });
  for (Activation act : {Activation::silu, Activation::gelu_tanh})
    each(tables, count, "act_mul", c, n,
         [&](const KernelTable& t, float* y) { t.act_mul(act, a, b, n, y); });
}

void test_rope(const KernelTable* const* tables, int count, int64_t head_dim) {
  float* x = slot<float>(kA, head_dim);
  float* cos = slot<float>(kB, head_dim / 2);
  float* sin = slot<float>(kC, head_dim / 2);
  fill_floats(x, head_dim, -6, 6);
  fill_floats(cos, head_dim / 2, -6, -1);
  fill_floats(sin, head_dim / 2, -6, -1);
  each(tables, count, "rope", {nullptr, nullptr, "", {head_dim}}, head_dim,
       [&](const KernelTable& t, float* y) {
         memcpy(y, x, static_cast<size_t>(head_dim) * 4);
         t.rope(y, cos, sin, head_dim);
       });
}

// One block of every KV cache format: token by token, and sealed.
void test_kv_blocks(const KernelTable* const* tables, int count, int64_t head_dim) {
  float* x = slot<float>(kA, head_dim);
  for (int kv = 0; kv < kKvFormatCount; ++kv) {
    const KvInfo& info = kKvInfo[kv];
    const auto store = [&](const KernelTable& t, int format, uint8_t* block, int64_t lane) {
      t.kv->formats[format].store(x, x, block, lane, head_dim);
    };
    fill_floats(x, head_dim, -6, 6);
    for (int64_t lane : {0, 7, 15})
      if (info.sealed_from < 0)
        each(tables, count, "store", {nullptr, nullptr, info.name, {head_dim, lane}},
             info.block_bytes(head_dim) / 4, [&](const KernelTable& t, float* y) {
               store(t, kv, reinterpret_cast<uint8_t*>(y), lane);
             });
    if (info.sealed_from < 0) continue;
    auto* grown = slot<uint8_t>(kB, kKvInfo[info.sealed_from].block_bytes(head_dim));
    for (int64_t lane = 0; lane < kBlock; ++lane) {
      random_activations(x, head_dim);
      store(*tables[0], info.sealed_from, grown, lane);
    }
    each(tables, count, "seal", {nullptr, nullptr, info.name, {head_dim}},
         info.block_bytes(head_dim) / 4, [&](const KernelTable& t, float* y) {
           t.kv->formats[kv].seal(grown, reinterpret_cast<uint8_t*>(y), head_dim);
         });
  }
}

struct Attention {
  int64_t head_dim, group_heads, rows, last, window;
};

void test_attention(const KernelTable* const* tables, int count, const Attention& p) {
  const int64_t blocks = (p.last + p.rows - 1) / kBlock + 1;
  auto* table = slot<int32_t>(kA, blocks);
  for (int64_t i = 0; i < blocks; ++i) table[i] = static_cast<int32_t>((i * 7 + 3) % blocks);
  if (blocks % 7 == 0)
    for (int64_t i = 0; i < blocks; ++i) table[i] = static_cast<int32_t>(blocks - 1 - i);
  const int64_t stride = p.group_heads * p.head_dim;
  float* q = slot<float>(kB, p.rows * stride);
  fill_floats(q, p.rows * stride, -6, 1);
  void* scratch = slot<uint8_t>(kScratch, kAttentionScratch);
  for (int kv = 0; kv < kKvFormatCount; ++kv) {
    const int64_t bytes = kKvInfo[kv].block_bytes(p.head_dim);
    auto* cache = slot<uint8_t>(kPart0, blocks * bytes);
    float* token = slot<float>(kPart1, p.head_dim);
    const int from = kKvInfo[kv].sealed_from, grows = from < 0 ? kv : from;
    const KvKernels* kernels = tables[0]->kv->formats;
    auto* grown = slot<uint8_t>(kC, kKvInfo[grows].block_bytes(p.head_dim));
    for (int64_t i = 0; i < blocks * kBlock; ++i) {
      uint8_t* block = cache + i / kBlock * bytes;
      fill_floats(token, p.head_dim, -6, 1);
      kernels[grows].store(token, token, from < 0 ? block : grown, i % kBlock, p.head_dim);
      if (from >= 0 && i % kBlock == kBlock - 1) kernels[kv].seal(grown, block, p.head_dim);
    }
    const Case c{
        nullptr, nullptr, kKvInfo[kv].name, {p.head_dim, p.group_heads, p.rows, p.last, p.window}};
    each(tables, count, "attention", c, p.rows * (stride + 3), [&](const KernelTable& t, float* y) {
      t.kv->formats[kv].attention({q, stride, cache, table, p.head_dim, p.group_heads, p.rows,
                                   p.last, p.window, 0.125f, y, stride + 3, scratch});
    });
  }
}

void test_ops(const KernelTable* const* tables, int count) {
  for (int64_t n : {1, 15, 16, 17, 33, 64, 200, 576}) test_rows(tables, count, n);
  for (int64_t head_dim : {2, 16, 20, 64, 80, 128}) test_rope(tables, count, head_dim);
  for (int64_t head_dim : {1, 2, 8, 16, 20, 24, 64, 80, 100, 128, 256, 512})
    test_kv_blocks(tables, count, head_dim);
  for (int64_t head_dim : {16, 20, 64, 128})
    for (int64_t group_heads : {1, 3, 4})
      for (int64_t rows : {1, 5})
        for (int64_t last : {0, 15, 150, 530})
          for (int64_t window : {0, 40})
            test_attention(tables, count, {head_dim, group_heads, rows, last, window});
  auto* bytes = slot<uint8_t>(kPart0, 4096);
  random_bytes(bytes, 4096);
  each(tables, count, "read_stream", {nullptr, nullptr, "", {}}, 2,
       [&](const KernelTable& t, float* y) {
         const uint64_t sum = t.read_stream(bytes, 4096);
         memcpy(y, &sum, 8);
       });
}

// Prints what was compared since the last call.
void report(const char* name) {
  static int before = 0;
  print(name);
  print(": ");
  print_number(passed + failed - before);
  print(" compared\n");
  before = passed + failed;
}

}  // namespace

int run() {
  const KernelTable* tables[8];
  const int count = usable_tables(tables);
  print("tables:");
  for (int i = 0; i < count; ++i) {
    print(" ");
    print(tables[i]->isa);
  }
  print("\n");
  for (int format = 0; format < kFormatCount; ++format) {
    test_format(tables, count, format);
    report(kFormatInfo[format].name);
  }
  test_ops(tables, count);
  report("ops");
  print_number(passed);
  print(" passed, ");
  print_number(failed);
  print(" failed\n");
  return failed;
}

}  // namespace lacewing::test
