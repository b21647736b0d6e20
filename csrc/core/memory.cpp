#include "core/memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace lacewing {
namespace {

constexpr size_t kHuge = size_t{2} << 20;
constexpr size_t kPage = 4096;
constexpr size_t kLine = 64;

size_t round_up(size_t bytes, size_t unit) {
  if (bytes > SIZE_MAX - unit) throw std::bad_alloc();
  return (bytes + unit - 1) / unit * unit;
}

// Anonymous pages, trimmed to 2 MB alignment.
void* map_huge(size_t bytes) {
  const size_t wanted = bytes + kHuge;
  void* raw = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = (begin + kHuge - 1) / kHuge * kHuge;
  if (aligned > begin) munmap(raw, aligned - begin);
  const size_t tail = begin + wanted - (aligned + bytes);
  if (tail > 0) munmap(reinterpret_cast<void*>(aligned + bytes), tail);
  advise_huge_pages(reinterpret_cast<void*>(aligned), bytes);
  return reinterpret_cast<void*>(aligned);
}

}  // namespace

void advise_huge_pages(void* p, size_t bytes) {
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kHuge * kHuge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

Memory::Memory(size_t bytes) {
  if (bytes == 0) return;
  if (bytes >= kHuge) {
    bytes_ = round_up(bytes, kPage);
    if (bytes_ > SIZE_MAX - kHuge) throw std::bad_alloc();
    data_ = map_huge(bytes_);
  } else {
    bytes_ = round_up(bytes, kLine);
    data_ = std::aligned_alloc(kLine, bytes_);
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0, bytes_);
  }
}

Memory::~Memory() {
  if (!data_) return;
  if (bytes_ >= kHuge)
    munmap(data_, bytes_);
  else
    std::free(data_);
}

Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

size_t checked_product(std::initializer_list<int64_t> factors) {
  size_t product = 1;
  for (int64_t f : factors)
    if (__builtin_mul_overflow(product, static_cast<size_t>(f), &product)) throw std::bad_alloc();
  return product;
}

}  // namespace lacewing
