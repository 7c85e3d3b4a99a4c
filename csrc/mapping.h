// Anonymous memory in huge pages, and what it takes to have it there before it is used.
#pragma once

#include <cstddef>

#include "process.h"

namespace mhaffn {

constexpr size_t kPageBytes = 4096;
constexpr size_t kHugePageBytes = 2 << 20;

constexpr size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// An anonymous mapping, aligned to and a multiple of its page size; not inherited by forks.
class Mapping {
 public:
  // Throws Error(kPinned).
  explicit Mapping(size_t nbytes);
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();
  char* address() const { return address_; }
  size_t nbytes() const { return nbytes_; }

 private:
  Process owner_;
  char* address_ = nullptr;
  size_t nbytes_ = 0;
};

// Faults all pages in, several threads at once. False when `limit_s` ran out first. Throws Error(kPinned).
bool prefault(char* address, size_t nbytes, double limit_s);

// The share of the memory that lies in huge pages, 0 to 1.
double huge_page_share(const char* address, size_t nbytes);

}  // namespace mhaffn
