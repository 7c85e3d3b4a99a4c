#include "pinned.h"

#include <stdint.h>

#include <algorithm>
#include <fstream>
#include <vector>

#include "clock.h"
#include "cuda.h"
#include "numa.h"

namespace mhaffn {
namespace {

size_t available_bytes() {
  std::ifstream file("/proc/meminfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("MemAvailable:", 0) == 0) return std::stoull(line.substr(13)) * 1024;
  }
  return SIZE_MAX;
}

}  // namespace

class CudaRegistration {
 public:
  explicit CudaRegistration(std::shared_ptr<Mapping> mapping) : mapping_(std::move(mapping)) {}
  ~CudaRegistration() {
    if (owner_.is_current()) Cuda::instance().unregister_memory(mapping_->address());
  }

 private:
  Process owner_;
  std::shared_ptr<Mapping> mapping_;
};

Lease::Lease(std::shared_ptr<Arena> arena, size_t offset, size_t nbytes)
    : arena_(std::move(arena)), offset_(offset), nbytes_(nbytes) {}

Lease::~Lease() {
  if (arena_->owner().is_current()) arena_->release(offset_);
}

char* Lease::address() const { return arena_->address() + offset_; }

std::shared_ptr<Arena> Arena::create(const ArenaOptions& options) { return std::shared_ptr<Arena>(new Arena(options)); }

Arena::Arena(const ArenaOptions& options) {
  if (options.nbytes > SIZE_MAX - kHugePageBytes) {
    fail_pinned("an arena of " + std::to_string(options.nbytes) + " bytes is more than can be addressed");
  }
  const size_t nbytes = round_up(options.nbytes, kHugePageBytes);
  const size_t available = available_bytes();
  if (options.prefault && nbytes > available) {
    fail_pinned("an arena of " + std::to_string(nbytes) + " bytes does not fit: " + std::to_string(available) +
                " bytes of host memory are available; lower the DRAM budget or free memory");
  }
  mapping_ = std::make_shared<Mapping>(std::max(nbytes, kHugePageBytes));
  info_.nbytes = mapping_->nbytes();
  const bool cuda = options.cuda != UseCuda::kNo;
  info_.cuda_reason = cuda ? Cuda::instance().reason() : "not asked for";
  if (options.cuda == UseCuda::kYes && !info_.cuda_reason.empty()) {
    fail_pinned("the arena cannot be registered with CUDA: " + info_.cuda_reason);
  }

  const bool chosen = options.numa_node != kNearGpu;
  const int node = chosen ? options.numa_node : near_node("/sys", cuda ? Cuda::instance().pci_address() : "");
  if (chosen || node >= 0) {
    const int error = prefer_node(address(), this->nbytes(), node);
    if (error == 0) info_.numa_node = node;
    if (error != 0 && chosen) {
      fail_pinned("no memory can be had from NUMA node " + std::to_string(node) + ": " + errno_text(error), error);
    }
  }

  if (options.prefault) {
    const double start = monotonic_s();
    info_.prefaulted = prefault(address(), this->nbytes(), options.prefault_limit_s);
    info_.prefault_s = monotonic_s() - start;
  }
  if (info_.cuda_reason.empty()) {
    const double start = monotonic_s();
    info_.cuda_reason = Cuda::instance().register_memory(address(), this->nbytes());
    info_.register_s = monotonic_s() - start;
    info_.cuda_registered = info_.cuda_reason.empty();
    if (info_.cuda_registered) registration_ = std::make_unique<CudaRegistration>(mapping_);
    if (options.cuda == UseCuda::kYes && !info_.cuda_registered) {
      fail_pinned("registering " + std::to_string(this->nbytes()) + " bytes with CUDA failed: " + info_.cuda_reason);
    }
  }
  info_.huge_page_share = huge_page_share(address(), this->nbytes());
}

Arena::~Arena() = default;

std::shared_ptr<Lease> Arena::lease(size_t nbytes, std::optional<size_t> offset) {
  owner_.require("this PinnedArena");
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) fail_pinned("the arena is closed");
  const size_t pages = round_up(nbytes, kPageBytes);
  if (nbytes == 0 || pages < nbytes || pages > this->nbytes()) {
    fail_pinned("cannot lease " + std::to_string(nbytes) + " bytes of an arena of " + std::to_string(this->nbytes()));
  }
  if (!offset) {
    offset = first_fit(pages);
    if (*offset == SIZE_MAX) {
      fail_pinned("no " + std::to_string(pages) +
                  " contiguous bytes are free in the arena: " + std::to_string(info_.leased_bytes) + " of " +
                  std::to_string(this->nbytes()) + " are leased; release slots first or make it larger");
    }
  } else {
    if (*offset % kPageBytes != 0) {
      fail_pinned("a lease starts at a multiple of 4096 bytes, got " + std::to_string(*offset));
    }
    if (*offset > this->nbytes() - pages) {
      fail_pinned("a lease of " + std::to_string(pages) + " bytes at " + std::to_string(*offset) +
                  " passes the end of the arena at " + std::to_string(this->nbytes()));
    }
    auto after = leases_.lower_bound(*offset);
    const bool into_next = after != leases_.end() && after->first < *offset + pages;
    const bool into_last = after != leases_.begin() && std::prev(after)->first + std::prev(after)->second > *offset;
    if (into_next || into_last) {
      fail_pinned("bytes " + std::to_string(*offset) + " to " + std::to_string(*offset + pages) +
                  " of the arena overlap a live lease; release it first (a read still in flight holds its memory)");
    }
  }
  auto lease = std::make_shared<Lease>(shared_from_this(), *offset, nbytes);
  leases_[*offset] = pages;
  info_.leased_bytes += pages;
  info_.peak_leased_bytes = std::max(info_.peak_leased_bytes, info_.leased_bytes);
  return lease;
}

size_t Arena::first_fit(size_t pages) const {
  size_t at = 0;
  for (const auto& [offset, nbytes] : leases_) {
    if (offset - at >= pages) return at;
    at = offset + nbytes;
  }
  return nbytes() - at >= pages ? at : SIZE_MAX;
}

void Arena::release(size_t offset) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = leases_.find(offset);
  if (found == leases_.end()) return;
  info_.leased_bytes -= found->second;
  leases_.erase(found);
}

ArenaInfo Arena::info() const {
  owner_.require("this PinnedArena");
  std::lock_guard<std::mutex> lock(mutex_);
  ArenaInfo info = info_;
  info.leaked_bytes = leaked_bytes_;
  return info;
}

void Arena::close() {
  owner_.require("this PinnedArena");
  std::lock_guard<std::mutex> lock(mutex_);
  if (info_.leased_bytes > leaked_bytes_) {
    fail_pinned("the arena cannot be closed: " + std::to_string(info_.leased_bytes - leaked_bytes_) +
                " bytes are leased; release the slots and close the reader first");
  }
  closed_ = true;
}

void Arena::leak(std::shared_ptr<Lease> lease) {
  Arena& arena = *lease->arena();
  std::lock_guard<std::mutex> lock(arena.mutex_);
  static auto* leaked = new std::vector<std::shared_ptr<Lease>>;
  static auto* guard = new std::mutex;
  std::lock_guard<std::mutex> guarded(*guard);
  for (const auto& known : *leaked) {
    if (known == lease) return;
  }
  arena.leaked_bytes_ += round_up(lease->nbytes(), kPageBytes);
  leaked->push_back(std::move(lease));
}

}  // namespace mhaffn
