// Host memory that devices read from and write to: mapped once, huge pages, registered once, leased in pieces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "error.h"
#include "mapping.h"
#include "process.h"

namespace mhaffn {

enum class UseCuda { kAuto, kYes, kNo };

// Where there is more than one node with memory.
constexpr int kNearGpu = -1;

struct ArenaOptions {
  size_t nbytes = 0;
  UseCuda cuda = UseCuda::kAuto;
  bool prefault = true;
  double prefault_limit_s = 60.0;
  int numa_node = kNearGpu;
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
