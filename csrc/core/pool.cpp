#include "core/pool.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>

namespace lacewing {
namespace {

// Longer than the work between two barriers of a decode step differs between threads, and far
// shorter than a scheduler tick (1-4 ms).
constexpr auto kSpinTime = std::chrono::microseconds(200);

thread_local bool inside_run = false;

void futex_wait(std::atomic<uint32_t>* word, uint32_t old) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

bool spin_while(const std::atomic<uint32_t>& word, uint32_t old) {
  const auto end = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 64; ++i) {
      if (word.load(std::memory_order_acquire) != old) return true;
      __builtin_ia32_pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// CPUs granted by one cgroup directory; 0 if it sets no limit.
double cgroup_limit(const std::string& dir) {
  std::istringstream v2(read_line(dir + "/cpu.max"));
  std::string quota;
  double period = 0;
  if (v2 >> quota >> period) return quota == "max" || period <= 0 ? 0 : std::stod(quota) / period;
  const std::string v1 = read_line(dir + "/cpu.cfs_quota_us");
  const std::string v1_period = read_line(dir + "/cpu.cfs_period_us");
  if (v1.empty() || v1_period.empty()) return 0;
  const double q = std::atof(v1.c_str()), p = std::atof(v1_period.c_str());
  return q > 0 && p > 0 ? q / p : 0;
}

// The limit holds for every ancestor: the smallest one counts.
double tightest_limit(const std::string& mount, std::string path) {
  double best = 0;
  for (;;) {
    const double limit = cgroup_limit(mount + path);
    if (limit > 0 && (best == 0 || limit < best)) best = limit;
    if (path.empty() || path == "/") return best;
    path.resize(path.find_last_of('/'));
  }
}

double cgroup_quota() {
  std::ifstream file("/proc/self/cgroup");
  double best = 0;
  for (std::string line; std::getline(file, line);) {  // id:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string mount;
    if (controllers.empty()) {
      mount = "/sys/fs/cgroup";
    } else {
      std::istringstream names(controllers);
      for (std::string name; std::getline(names, name, ',');)
        if (name == "cpu") mount = "/sys/fs/cgroup/cpu";
    }
    if (mount.empty()) continue;
    const double limit = tightest_limit(mount, line.substr(second + 1));
    if (limit > 0 && (best == 0 || limit < best)) best = limit;
  }
  return best;
}

std::vector<int> affinity() {
  std::vector<int> cpus;
  for (int capacity = 1024; capacity <= 1 << 18; capacity *= 4) {
    cpu_set_t* set = CPU_ALLOC(capacity);
    const size_t bytes = CPU_ALLOC_SIZE(capacity);
    const bool ok = sched_getaffinity(0, bytes, set) == 0;
    for (int cpu = 0; ok && cpu < capacity; ++cpu)
      if (CPU_ISSET_S(cpu, bytes, set)) cpus.push_back(cpu);
    CPU_FREE(set);
    if (ok) break;
  }
  if (cpus.empty()) cpus.push_back(0);
  return cpus;
}

void pin_to(int cpu) {
  const size_t bytes = CPU_ALLOC_SIZE(cpu + 1);
  cpu_set_t* set = CPU_ALLOC(cpu + 1);
  CPU_ZERO_S(bytes, set);
  CPU_SET_S(cpu, bytes, set);
  sched_setaffinity(0, bytes, set);  // a refusal costs speed, not correctness
  CPU_FREE(set);
}

// Moves the calling thread off the cores of the workers, for its lifetime. The caller's thread is
// not ours: it gets its affinity back (child processes would inherit the pin), and if it is not in
// the way it is left alone, because two affinity calls cost 6 us and more.
class ScopedPin {
 public:
  ScopedPin(const std::vector<int>& cores, int n) {
    const int here = sched_getcpu();
    const auto end = cores.begin() + std::min<size_t>(n, cores.size());
    active_ = std::find(cores.begin() + 1, end, here) != end &&
              sched_getaffinity(0, sizeof(old_), &old_) == 0;
    if (active_) pin_to(cores[0]);
  }
  ~ScopedPin() {
    if (active_) sched_setaffinity(0, sizeof(old_), &old_);
  }
  ScopedPin(const ScopedPin&) = delete;
  ScopedPin& operator=(const ScopedPin&) = delete;

 private:
  bool active_;
  cpu_set_t old_;
};

}  // namespace

void Gate::advance() {
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) futex_wake_all(&value_);
}

void Gate::wait(uint32_t old, bool spin) {
  if (spin && spin_while(value_, old)) return;
  // Sequential consistency with advance(): either it sees this sleeper or we see its value.
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (value_.load(std::memory_order_seq_cst) == old) futex_wait(&value_, old);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

void Barrier::wait() {
  if (n_ == 1) return;
  const uint32_t generation = gate_.value();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_) {
    arrived_.store(0, std::memory_order_relaxed);
    gate_.advance();
  } else {
    gate_.wait(generation, spin_);
  }
}

Cpus read_cpus() {
  Cpus cpus{affinity(), {}, 0, cgroup_quota()};
  std::vector<int> second;
  std::vector<std::string> seen;
  for (int cpu : cpus.allowed) {
    const std::string siblings = read_line("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                                           "/topology/thread_siblings_list");
    const bool known =
        !siblings.empty() && std::find(seen.begin(), seen.end(), siblings) != seen.end();
    (known ? second : cpus.cores).push_back(cpu);
    if (!known) seen.push_back(siblings);
  }
  cpus.physical = static_cast<int>(cpus.cores.size());
  cpus.cores.insert(cpus.cores.end(), second.begin(), second.end());
  return cpus;
}

// Threads and what they share. Never destroyed: at exit the workers just sleep, and after a fork
// the child leaves the parent's copy alone and makes its own.
struct Pool::State {
  struct Worker {
    Gate go;
    std::thread thread;
  };

  std::mutex running;
  std::vector<std::unique_ptr<Worker>> workers;  // worker i is tid i + 1
  FunctionRef<void(int, int)>* fn = nullptr;
  int n = 0;
  std::atomic<bool> spin{true};
  alignas(64) std::atomic<int> pending{0};
  Gate done;

  void grow(int count, const Pool& pool);
  void work(int tid, int cpu) noexcept;
  static void call(FunctionRef<void(int, int)> fn, int tid, int n) noexcept { fn(tid, n); }
};

void Pool::State::work(int tid, int cpu) noexcept {
  if (cpu >= 0) pin_to(cpu);
  inside_run = true;
  Worker& self = *workers[tid - 1];
  for (uint32_t seen = 0;; ++seen) {
    self.go.wait(seen, spin.load(std::memory_order_relaxed));
    call(*fn, tid, n);
    if (pending.fetch_sub(1, std::memory_order_acq_rel) == 1) done.advance();
  }
}

void Pool::State::grow(int count, const Pool& pool) {
  workers.reserve(kMaxThreads);  // running workers hold on to their element
  // Signals are for the caller's threads: Python must see Ctrl-C in its own.
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  try {
    while (static_cast<int>(workers.size()) < count) {
      const int tid = static_cast<int>(workers.size()) + 1;
      const bool has_core = tid < static_cast<int>(pool.cpus_.cores.size());
      workers.push_back(std::make_unique<Worker>());
      const int cpu = pool.pin_ && has_core ? pool.cpus_.cores[tid] : -1;
      try {
        workers.back()->thread = std::thread(&State::work, this, tid, cpu);
      } catch (...) {
        workers.pop_back();
        throw;
      }
      workers.back()->thread.detach();
    }
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
}

Pool::Pool() : cpus_(read_cpus()) {
  const int by_quota = cpus_.quota > 0 ? static_cast<int>(std::floor(cpus_.quota)) : kMaxThreads;
  default_threads_ = std::clamp(std::min(cpus_.physical, by_quota), 1, kMaxThreads);
  const int allowed = static_cast<int>(cpus_.allowed.size());
  spin_limit_ = std::min(allowed, std::max(1, by_quota));
  // Under a quota smaller than the affinity mask the scheduler knows better: containers that all
  // pin to the first cores of a big machine would fight for them.
  pin_ = by_quota >= allowed;
  threads_ = default_threads_;
  pthread_atfork(nullptr, nullptr, [] { Pool::instance().state_.store(nullptr); });
}

Pool& Pool::instance() {
  static Pool* pool = new Pool;
  return *pool;
}

Pool::State& Pool::state() {
  State* current = state_.load(std::memory_order_acquire);
  if (current) return *current;
  auto fresh = std::make_unique<State>();
  if (state_.compare_exchange_strong(current, fresh.get(), std::memory_order_acq_rel))
    return *fresh.release();
  return *current;
}

void Pool::set_threads(int n) {
  threads_.store(n <= 0 ? default_threads_ : std::min(n, kMaxThreads), std::memory_order_relaxed);
}

int Pool::resolve(int threads) const {
  if (inside_run) return 1;
  return threads <= 0 ? this->threads() : std::min(threads, kMaxThreads);
}

void Pool::run(int threads, FunctionRef<void(int, int)> fn) {
  const int n = resolve(threads);
  if (n == 1) return State::call(fn, 0, 1);
  State& shared = state();
  const std::lock_guard lock(shared.running);
  shared.grow(n - 1, *this);
  pin_caller_and_run(shared, n, fn);
}

void Pool::pin_caller_and_run(State& shared, int n, FunctionRef<void(int, int)> fn) {
  const uint32_t round = shared.done.value();
  shared.fn = &fn;
  shared.n = n;
  shared.spin.store(may_spin(n), std::memory_order_relaxed);
  shared.pending.store(n - 1, std::memory_order_relaxed);
  for (int i = 0; i < n - 1; ++i) shared.workers[i]->go.advance();
  const ScopedPin pin(cpus_.cores, pin_ ? n : 1);
  inside_run = true;
  State::call(fn, 0, n);
  inside_run = false;
  shared.done.wait(round, may_spin(n));
}

}  // namespace lacewing
