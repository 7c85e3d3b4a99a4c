// Host memory that devices read from and write to: mapped once, huge pages, registered once, leased in pieces.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "error.h"

namespace mhaffn {

constexpr size_t kPageBytes = 4096;
constexpr size_t kHugePageBytes = 2 << 20;

constexpr size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Memory, threads and rings are not shared with a fork: each object knows the process that made it.
class Process {
 public:
  Process() : id_(getpid()) {}
  bool is_current() const { return getpid() == id_; }
  // Throws Error(kUnavailable) in a fork of the process.
  void require(const char* what) const {
    if (!is_current()) {
      fail_unavailable(std::string(what) + " belongs to process " + std::to_string(id_) +
                       " and does not work in its fork " + std::to_string(getpid()) +
                       ": make new ones there (multiprocessing: start method \"spawn\")");
    }
  }

 private:
  const pid_t id_;
};

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

enum class UseCuda { kAuto, kYes, kNo };

struct ArenaOptions {
  size_t nbytes = 0;
  UseCuda cuda = UseCuda::kAuto;
  bool prefault = true;
  double prefault_limit_s = 60.0;
  // -1: near the GPU, where there is more than one node.
  int numa_node = -1;
};

struct ArenaInfo {
  size_t nbytes = 0;
  size_t leased_bytes = 0;
  size_t peak_leased_bytes = 0;
  size_t leaked_bytes = 0;
  double huge_page_share = 0.0;
  double prefault_s = 0.0;
  bool prefaulted = false;
  bool cuda_registered = false;
  std::string cuda_reason;
  double register_s = 0.0;
  int numa_node = -1;
};

class Arena;

// A range of an arena that nobody else holds; given back on destruction.
class Lease {
 public:
  Lease(std::shared_ptr<Arena> arena, size_t offset, size_t nbytes);
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease();
  char* address() const;
  size_t offset() const { return offset_; }
  size_t nbytes() const { return nbytes_; }
  const std::shared_ptr<Arena>& arena() const { return arena_; }

 private:
  std::shared_ptr<Arena> arena_;
  size_t offset_;
  size_t nbytes_;
};

class CudaRegistration;

class Arena : public std::enable_shared_from_this<Arena> {
 public:
  // Maps, faults in and registers. Throws Error(kPinned).
  static std::shared_ptr<Arena> create(const ArenaOptions& options);
  ~Arena();

  // `offset`: exactly there, in multiples of 4 KiB; none: the first place it fits. Throws Error(kPinned).
  std::shared_ptr<Lease> lease(size_t nbytes, std::optional<size_t> offset);
  ArenaInfo info() const;
  // No lease is given afterwards. Throws Error(kPinned) while leases live. The memory goes with its last user.
  void close();

  char* address() const { return mapping_->address(); }
  size_t nbytes() const { return mapping_->nbytes(); }
  const Process& owner() const { return owner_; }

  // Never given back: something may still write to it.
  static void leak(std::shared_ptr<Lease> lease);

 private:
  friend class Lease;
  explicit Arena(const ArenaOptions& options);
  void release(size_t offset);
  size_t first_fit(size_t nbytes) const;

  Process owner_;
  std::shared_ptr<Mapping> mapping_;
  std::unique_ptr<CudaRegistration> registration_;
  mutable std::mutex mutex_;
  std::map<size_t, size_t> leases_;  // offset to bytes, in whole pages
  size_t leaked_bytes_ = 0;
  bool closed_ = false;
  ArenaInfo info_;
};

}  // namespace mhaffn
