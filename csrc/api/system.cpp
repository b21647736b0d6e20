// The machine as this process sees it, its thread pool, its memory bandwidth; single operations of
// the engine for tests.
#include <cpuid.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "api/check.h"
#include "api/module.h"
#include "core/cpu.h"
#include "core/dispatch.h"
#include "core/memory.h"
#include "core/pool.h"

namespace lacewing {
namespace {

using Isa = std::optional<std::string>;
using Matrix = Array<float, 2>;

// ---- threads

void set_threads(int n) {
  require_range("set_threads: n", n, 0, Pool::kMaxThreads);
  Pool::instance().set_threads(n);
}

int threads() { return Pool::instance().threads(); }

// ---- bandwidth

constexpr size_t kPage = 4096;

// Seconds of one pass of all threads over their contiguous parts.
double read_once(const KernelTable& table, const Memory& memory, int threads,
                 std::atomic<uint64_t>& sink) {
  const size_t pages = memory.size() / kPage;
  const auto begin = std::chrono::steady_clock::now();
  Pool::instance().run(threads, [&](int tid, int n) {
    const size_t first = pages * static_cast<size_t>(tid) / static_cast<size_t>(n);
    const size_t last = pages * (static_cast<size_t>(tid) + 1) / static_cast<size_t>(n);
    sink += table.read_stream(memory.data() + first * kPage, (last - first) * kPage);
  });
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Best pass: other processes can only make one slower.
double read_bandwidth(int64_t bytes, int threads, const Isa& isa, double seconds) {
  require_range("read_bandwidth: bytes", bytes, 1 << 20, int64_t{1} << 40);
  require_range("read_bandwidth: threads", threads, 0, Pool::kMaxThreads);
  require(seconds > 0 && seconds <= 60, "read_bandwidth: seconds must be in 0..60");
  const KernelTable& table = table_of(isa);
  nb::gil_scoped_release release;
  const Memory memory(static_cast<size_t>(bytes));
  std::memset(memory.data(), 1, memory.size());  // or all pages would be one page of zeros
  std::atomic<uint64_t> sink{0};
  double best = read_once(table, memory, threads, sink);
  for (double spent = best; spent < seconds;) {
    const double time = read_once(table, memory, threads, sink);
    best = std::min(best, time);
    spent += time;
  }
  return static_cast<double>(memory.size()) / best * 1e-9;
}

// ---- peaks

// GOP/s of all threads while they do nothing but multiply and add, the best of several turns.
double compute_peak(const std::string& kind, const Isa& isa, int threads, double seconds) {
  require(kind == "int8" || kind == "float",
          "compute_peak: kind must be `int8` or `float`, got `" + kind + "`");
  require_range("compute_peak: threads", threads, 0, Pool::kMaxThreads);
  require(seconds > 0 && seconds <= 60, "compute_peak: seconds must be in 0..60");
  const KernelTable& table = table_of(isa);
  const auto spin = kind == "int8" ? table.spin_int8 : table.spin_float;
  nb::gil_scoped_release release;
  double best = 0, spent = 0;
  for (int64_t turns = 1 << 10; spent < seconds || best == 0;) {
    std::atomic<int64_t> operations{0};
    const auto begin = std::chrono::steady_clock::now();
    Pool::instance().run(threads, [&](int, int) { operations += spin(turns); });
    const double time =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    spent += time;
    if (time < 2e-3 && turns < int64_t{1} << 40)
      turns *= 2;  // too short to tell
    else
      best = std::max(best, static_cast<double>(operations) / time * 1e-9);
  }
  return best;
}

// ---- where products switch from one driver to the next

nb::dict switches(Switch FormatKernels::*kind, const Isa& isa) {
  const KernelTable& table = table_of(isa);
  nb::dict all;
  for (int i = 0; i < kFormatCount; ++i) {
    const Switch& s = table.formats[i].*kind;
    nb::dict d;
    d["rows"] = __atomic_load_n(s.rows, __ATOMIC_RELAXED);
    d["default"] = standard_of(s);
    d["most"] = s.most;
    all[kFormatInfo[i].name] = d;
  }
  return all;
}

void set_switch(Switch FormatKernels::*kind, const char* what, const std::string& format,
                const std::optional<int>& rows, const Isa& isa) {
  const Switch& s = table_of(isa).formats[format_index(format)].*kind;
  if (rows) require_range(what, *rows, 0, s.most);
  __atomic_store_n(s.rows, rows.value_or(standard_of(s)), __ATOMIC_RELAXED);
}

nb::dict gemv_rows(const Isa& isa) { return switches(&FormatKernels::gemv, isa); }

void set_gemv_rows(const std::string& format, const std::optional<int>& rows, const Isa& isa) {
  set_switch(&FormatKernels::gemv, "set_gemv_rows: rows", format, rows, isa);
}

nb::dict cpu_prefetch_rows(const Isa& isa) { return switches(&FormatKernels::cpu_prefetch, isa); }

void set_cpu_prefetch_rows(const std::string& format, const std::optional<int>& rows,
                           const Isa& isa) {
  set_switch(&FormatKernels::cpu_prefetch, "set_cpu_prefetch_rows: rows", format, rows, isa);
}

// ---- the machine

struct Leaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(uint32_t leaf, uint32_t sub = 0) {
  Leaf r;
  if (__get_cpuid_max(leaf & 0x80000000u, nullptr) >= leaf)
    __cpuid_count(leaf, sub, r.eax, r.ebx, r.ecx, r.edx);
  return r;
}

std::string brand() {
  std::string name;
  for (uint32_t leaf = 0x80000002; leaf <= 0x80000004; ++leaf) {
    const Leaf r = cpuid(leaf);
    name.append(reinterpret_cast<const char*>(&r), sizeof(r));
  }
  name.resize(std::strlen(name.c_str()));
  const size_t begin = name.find_first_not_of(' ');
  return begin == std::string::npos ? "unknown"
                                    : name.substr(begin, name.find_last_not_of(' ') - begin + 1);
}

nb::dict features() {
  const Leaf one = cpuid(1), seven = cpuid(7), seven1 = cpuid(7, 1), ext = cpuid(0x80000001);
  const auto bit = [](uint32_t word, int i) { return (word >> i & 1) != 0; };
  nb::dict d;
  d["sse4_2"] = bit(one.ecx, 20);
  d["popcnt"] = bit(one.ecx, 23);
  d["avx"] = bit(one.ecx, 28);
  d["f16c"] = bit(one.ecx, 29);
  d["fma"] = bit(one.ecx, 12);
  d["lzcnt"] = bit(ext.ecx, 5);
  d["bmi1"] = bit(seven.ebx, 3);
  d["bmi2"] = bit(seven.ebx, 8);
  d["avx2"] = bit(seven.ebx, 5);
  d["avx_vnni"] = bit(seven1.eax, 4);
  d["avx512f"] = bit(seven.ebx, 16);
  d["avx512bw"] = bit(seven.ebx, 30);
  d["avx512dq"] = bit(seven.ebx, 17);
  d["avx512vl"] = bit(seven.ebx, 31);
  d["avx512_vbmi"] = bit(seven.ecx, 1);
  d["avx512_vbmi2"] = bit(seven.ecx, 6);
  d["avx512_vnni"] = bit(seven.ecx, 11);
  d["avx512_bf16"] = bit(seven1.eax, 5);
  d["avx512_fp16"] = bit(seven.edx, 23);
  d["amx_tile"] = bit(seven.edx, 24);
  d["amx_int8"] = bit(seven.edx, 25);
  d["amx_bf16"] = bit(seven.edx, 22);
  return d;
}

// Register state that the OS saves (0 without OSXSAVE).
uint64_t xcr0() {
  if (!(cpuid(1).ecx >> 27 & 1)) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// "always [madvise] never" -> "madvise"
std::string huge_pages() {
  const std::string line = first_line("/sys/kernel/mm/transparent_hugepage/enabled");
  const size_t open = line.find('['), close = line.find(']');
  return open < close && close != std::string::npos ? line.substr(open + 1, close - open - 1)
                                                    : "unavailable";
}

// What is known of the CPU's data or unified cache of a level; empty: nothing.
std::string cache_directory(int cpu, int level) {
  const std::string base = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/cache/index";
  for (int i = 0; i < 8; ++i) {
    const std::string dir = base + std::to_string(i) + "/";
    if (first_line(dir + "level") == std::to_string(level) &&
        first_line(dir + "type") != "Instruction")
      return dir;
  }
  return {};
}

// Bytes of one; 0: unknown.
int64_t cache_bytes(int cpu, int level) {
  const std::string dir = cache_directory(cpu, level);
  if (dir.empty()) return 0;
  const std::string size = first_line(dir + "size");
  const int64_t number = std::atoll(size.c_str());
  return size.find('M') != std::string::npos ? number << 20 : number << 10;
}

// How many caches of the level the allowed CPUs have: CPUs that share one name the same CPUs.
int cache_count(const std::vector<int>& allowed, int level) {
  std::set<std::string> sharers;
  for (int cpu : allowed)
    if (const std::string dir = cache_directory(cpu, level); !dir.empty())
      sharers.insert(first_line(dir + "shared_cpu_list"));
  return static_cast<int>(sharers.size());
}

nb::dict cpu_info() {
  const Cpus cpus = read_cpus();
  const uint64_t saved = xcr0();
  nb::dict os, caches, d;
  os["avx"] = (saved & 0x6) == 0x6;
  os["avx512"] = (saved & 0xe6) == 0xe6;
  os["amx"] = (saved >> 17 & 3) == 3;
  for (int level = 1; level <= 3; ++level)
    caches[("l" + std::to_string(level)).c_str()] = cache_bytes(cpus.allowed[0], level);
  nb::list affinity;
  for (int cpu : cpus.allowed) affinity.append(cpu);
  d["model"] = brand();
  d["features"] = features();
  d["xcr0"] = saved;
  d["os_state"] = os;
  d["amx_permitted"] = read_cpu().tile_permitted;
  d["cores"] = cpus.physical;
  d["affinity"] = affinity;
  d["quota"] = cpus.quota > 0 ? nb::cast(cpus.quota) : nb::none();
  d["transparent_huge_pages"] = huge_pages();
  d["caches"] = caches;
  d["last_level_caches"] = std::max(cache_count(cpus.allowed, 3), 1);
  return d;
}

// ---- single operations

template <class... Shape>
nb::object numpy(Buffer<float>& buffer, Shape... shape) {
  return nb::cast(buffer.numpy(shape...));
}

template <class A>
int64_t extent(const A& array, size_t axis) {
  return static_cast<int64_t>(array.shape(axis));
}

nb::object rms_norm(const Matrix& x, const Array<float, 1>& weight, float eps, const Isa& isa) {
  const KernelTable& table = table_of(isa);
  const int64_t m = extent(x, 0), k = extent(x, 1);
  require(extent(weight, 0) == k,
          "rms_norm: weight must be [" + text(k) + "], got " + shape_text(weight));
  Buffer<float> y(x.size());
  for (int64_t r = 0; r < m; ++r) {
    const float* row = x.data() + r * k;
    table.scale_mul(row, table.rms_scale(row, k, eps), weight.data(), k, y.data.get() + r * k);
  }
  return numpy(y, m, k);
}

nb::object act_mul(const std::string& name, const Matrix& gate, const Matrix& up, const Isa& isa) {
  const KernelTable& table = table_of(isa);
  require(name == "silu" || name == "gelu_tanh",
          "act_mul: name must be `silu` or `gelu_tanh`, got `" + name + "`");
  require(extent(gate, 0) == extent(up, 0) && extent(gate, 1) == extent(up, 1),
          "act_mul: gate and up must have the same shape, got " + shape_text(gate) + " and " +
              shape_text(up));
  Buffer<float> y(gate.size());
  table.act_mul(name == "silu" ? Activation::silu : Activation::gelu_tanh, gate.data(), up.data(),
                static_cast<int64_t>(gate.size()), y.data.get());
  return numpy(y, extent(gate, 0), extent(gate, 1));
}

nb::object rope(const Matrix& x, const Matrix& cos, const Matrix& sin, const Isa& isa) {
  const KernelTable& table = table_of(isa);
  const int64_t m = extent(x, 0), d = extent(x, 1);
  require(d % 2 == 0, "rope: x must have an even number of columns, got " + text(d));
  for (const Matrix* t : {&cos, &sin})
    require(
        extent(*t, 0) == m && extent(*t, 1) == d / 2,
        "rope: cos and sin must be [" + text(m) + ", " + text(d / 2) + "], got " + shape_text(*t));
  Buffer<float> y(x.size());
  std::copy_n(x.data(), x.size(), y.data.get());
  for (int64_t r = 0; r < m; ++r)
    table.rope(y.data.get() + r * d, cos.data() + r * (d / 2), sin.data() + r * (d / 2), d);
  return numpy(y, m, d);
}

}  // namespace

void register_system(nb::module_& m) {
  m.def("set_threads", &set_threads, nb::arg("n"),
        "Threads of the pool; 0: the machine's default.");
  m.def("threads", &threads, "Threads of the pool by default.");
  m.def("read_bandwidth", &read_bandwidth, nb::arg("bytes"), nb::arg("threads") = 0,
        nb::arg("isa") = nb::none(), nb::arg("seconds") = 0.5,
        "Best GB/s of reading a buffer of `bytes` in turn, at least 1 MiB of them.");
  m.def("compute_peak", &compute_peak, nb::arg("kind"), nb::arg("isa") = nb::none(),
        nb::arg("threads") = 0, nb::arg("seconds") = 0.2,
        "Best GOP/s of multiplying and adding in registers, `int8` or `float`.");
  m.def("gemv_rows", &gemv_rows, nb::arg("isa") = nb::none(),
        "Up to how many rows gemv takes a product: rows, default and most, by format.");
  m.def("set_gemv_rows", &set_gemv_rows, nb::arg("format"), nb::arg("rows").none(),
        nb::arg("isa") = nb::none(), "Sets it, from 0 to `most`; None: the default.");
  m.def(
      "cpu_prefetch_rows", &cpu_prefetch_rows, nb::arg("isa") = nb::none(),
      "Up to how many rows gemv leaves prefetching to the CPU: rows, default and most, by format.");
  m.def("set_cpu_prefetch_rows", &set_cpu_prefetch_rows, nb::arg("format"), nb::arg("rows").none(),
        nb::arg("isa") = nb::none(), "Sets it, from 0 to `most`; None: the default.");
  m.def("cpu_info", &cpu_info, "What this CPU, operating system and container offer.");
  m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"),
        nb::arg("isa") = nb::none(), "x / sqrt(mean(x^2) + eps) * weight, row by row.");
  m.def("act_mul", &act_mul, nb::arg("name"), nb::arg("gate"), nb::arg("up"),
        nb::arg("isa") = nb::none(), "act(gate) * up");
  m.def("rope", &rope, nb::arg("x"), nb::arg("cos"), nb::arg("sin"), nb::arg("isa") = nb::none(),
        "Rows of x [m, d] turned by their angles [m, d / 2], halves layout.");
}

}  // namespace lacewing
