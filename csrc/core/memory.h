// Aligned, zeroed memory that asks for huge pages where they help.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace lacewing {

// Asks the kernel to back the whole huge pages inside [p, p + bytes) with huge pages. Best effort.
void advise_huge_pages(void* p, size_t bytes);

// The product of sizes. Throws std::bad_alloc where it overflows.
size_t checked_product(std::initializer_list<int64_t> factors);

// `bytes` of zeros, 64-byte aligned; from 2 MB on 2 MB aligned, and lazily committed.
// Owns the memory; throws std::bad_alloc.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  uint8_t* data() const { return as<uint8_t>(); }
  size_t size() const { return bytes_; }
  // At least so many bytes; if they become more, what was there is lost.
  void reserve(size_t bytes) {
    if (bytes_ < bytes) *this = Memory(bytes);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace lacewing
