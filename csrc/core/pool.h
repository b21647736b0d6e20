// The process's one thread pool: pinned workers that spin, then sleep; the caller is worker 0.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace lacewing {

// Non-owning reference to a callable; the callable must outlive the call it is passed to.
template <class Signature>
class FunctionRef;

template <class R, class... Args>
class FunctionRef<R(Args...)> {
 public:
  template <class F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef>)
  FunctionRef(F&& f)  // NOLINT: implicit on purpose, so that lambdas can be passed
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* object, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(args...);
        }) {}

  R operator()(Args... args) const { return call_(object_, args...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

// A counter that threads can wait on: they spin for a bounded time and then sleep in a futex, so
// that a waiting thread never holds a core for a whole scheduler tick.
class alignas(64) Gate {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  // Adds one and wakes who waits for it.
  void advance();
  // Returns once value() != old.
  void wait(uint32_t old, bool spin = true);

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

// Meeting point of the `n` threads of one run. Lives outside the run, reusable any number of times.
class Barrier {
 public:
  explicit Barrier(int n, bool spin = true) : n_(n), spin_(spin) {}
  void wait();

 private:
  const int n_;
  const bool spin_;
  alignas(64) std::atomic<int> arrived_{0};
  Gate gate_;
};

// What the machine lets this process use (read once, when the pool is made).
struct Cpus {
  std::vector<int> allowed;  // by affinity
  std::vector<int> cores;    // one per physical core, then the second hardware threads
  int physical;              // how many of `cores` are physical cores
  double quota;              // CPUs by cgroup quota; 0: no quota
};
Cpus read_cpus();

class Pool {
 public:
  static constexpr int kMaxThreads = 1024;

  static Pool& instance();

  // Calls fn(tid, n) for tid = 0..n-1 at once, tid 0 on the calling thread; returns when all
  // are done. `threads` <= 0 means the default. fn must not throw (the process ends). Calls from
  // several threads are served one after another; a call from inside a run gets n = 1.
  void run(int threads, FunctionRef<void(int, int)> fn);

  // The default: min(physical cores allowed by affinity, whole CPUs of the cgroup quota), >= 1.
  int threads() const { return threads_.load(std::memory_order_relaxed); }
  // Sets it; 0 restores the machine's default.
  void set_threads(int n);
  // How many a run of `threads` will really use.
  int resolve(int threads) const;
  // Whether waiting threads may spin: every one of n has a core to itself.
  bool may_spin(int n) const { return n <= spin_limit_; }

 private:
  struct State;

  Pool();
  State& state();
  void pin_caller_and_run(State& state, int n, FunctionRef<void(int, int)> fn);

  std::atomic<int> threads_;
  int default_threads_;
  int spin_limit_;
  bool pin_;
  Cpus cpus_;
  std::atomic<State*> state_{nullptr};
};

}  // namespace lacewing
