// The reader's contract: extents of files in, exact bytes in a slot or a typed error out.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "engine_core.h"
#include "file.h"
#include "pinned.h"

namespace mhaffn {

// Bytes [offset, offset + length) of a file.
struct Extent {
  std::string path;
  uint64_t offset = 0;
  uint64_t length = 0;
};

// A run of a file that holds whole extents: starts at a page, `length` is whole pages and may pass the end of
// the file, `need` is what the extents ask for.
struct Cover {
  std::string path;
  uint64_t offset = 0;
  uint64_t length = 0;
  uint64_t need = 0;
  uint64_t position = 0;  // in the slot, from where the request starts
};

// Where everything goes: covers one after another, extents that touch or share a page in one cover.
struct Layout {
  std::vector<Cover> covers;
  std::vector<uint64_t> placements;  // of each extent, from where the request starts
  uint64_t cover_bytes = 0;
  uint64_t extent_bytes = 0;
};

// Throws std::invalid_argument for an extent past the range of file offsets.
Layout lay_out(const std::vector<Extent>& extents);

enum class EngineKind { kAuto, kUring, kThreads };

struct ReaderOptions {
  EngineKind engine = EngineKind::kAuto;
  Direct direct = Direct::kAuto;
  bool strict = false;
  uint32_t block_bytes = 4 << 20;
  unsigned depth = 8;
  double close_limit_s = 4.0;
};

struct DeviceInfo {
  std::string device;  // major:minor
  std::string engine;
  bool direct = false;
  bool registered_buffers = false;
  bool registered_files = false;
  std::string detail;
  uint64_t bytes_read = 0;
  double busy_s = 0.0;
  uint64_t retries = 0;
};

struct ReaderInfo {
  std::string engine;
  std::string direct;
  bool registered_buffers = false;
  std::vector<std::string> reasons;
  std::vector<DeviceInfo> devices;
  uint64_t bytes_read = 0;
  double busy_s = 0.0;
  uint64_t leaked_bytes = 0;
  std::string liburing;
};

class ReaderShared;

// One submit(): what arrives, and what went wrong first. Shared by the caller and the threads that read.
class Request {
 public:
  static constexpr double kNoProgressLimitS = 60.0;
  // Called between slices of a wait without a lock held; throws to end the wait.
  using Interrupt = std::function<void()>;

  Request(std::shared_ptr<ReaderShared> reader, Layout layout, std::shared_ptr<Lease> lease, uint64_t slot_offset);

  const Layout& layout() const { return layout_; }
  uint64_t slot_offset() const { return slot_offset_; }
  uint64_t ready_bytes() const { return ready_.load(std::memory_order_acquire); }
  bool done() const { return done_.load(std::memory_order_acquire); }
  double started_s() const;
  double finished_s() const;

  // Until done. `timeout_s`: none for 60 s without progress. Throws Error of the read, or kTimeout.
  void wait(std::optional<double> timeout_s, const Interrupt& interrupt);
  // Until `nbytes` are ready, or done; returns what is ready. Throws as wait().
  uint64_t wait_ready(uint64_t nbytes, std::optional<double> timeout_s, const Interrupt& interrupt);
  void cancel();

 private:
  friend class Reader;
  friend class ReaderShared;
  friend class Part;

  // A piece in the order of the slot, and how much of it has arrived.
  struct Run {
    uint64_t position;
    uint32_t length;
    uint32_t need;
    uint32_t done;
  };

  bool stopped() const { return stopped_.load(std::memory_order_acquire); }
  std::shared_ptr<Lease> lease() const;
  void expect_parts(size_t count);
  void started(double now);
  void progressed(size_t run, uint32_t done, double now);
  void fail(Failure failure);
  void part_drained(double now);
  // Something may still write to its memory: the lease is never given back.
  void abandon();
  void finish(double now, bool keep_lease);
  uint64_t wait_until(uint64_t nbytes, std::optional<double> timeout_s, const Interrupt& interrupt);
  [[noreturn]] void time_out(double waited_s) const;

  const Process owner_;
  const std::shared_ptr<ReaderShared> reader_;
  const Layout layout_;
  const uint64_t slot_offset_;

  mutable std::mutex mutex_;
  std::condition_variable change_;
  bool finishing_ = false;
  std::shared_ptr<Lease> lease_;
  std::vector<Run> runs_;
  size_t first_unready_ = 0;
  size_t parts_ = 0;
  uint64_t wake_at_ = UINT64_MAX;
  std::optional<Failure> failure_;
  double started_s_ = 0.0;
  double finished_s_ = 0.0;
  std::atomic<uint64_t> ready_{0};
  std::atomic<bool> stopped_{false};
  std::atomic<bool> done_{false};
};

// Reads into leased memory, one thread and one ring a device. Any thread may call it.
class Reader {
 public:
  // `arena`: registered with the ring, in pieces of at most 1 GiB. Throws Error(kUnavailable), std::invalid_argument.
  Reader(const ReaderOptions& options, std::shared_ptr<Arena> arena);
  ~Reader();

  // Never blocks. Throws std::invalid_argument where the slot is too small or the place is not aligned.
  std::shared_ptr<Request> submit(std::vector<Extent> extents, std::shared_ptr<Lease> lease, uint64_t slot_offset);
  ReaderInfo info() const;
  // Cancels and drains everything. What could not be drained in time is leaked; returns how many bytes.
  uint64_t close();

  // "static", "shared" or "none".
  static const char* liburing();

 private:
  Process owner_;
  std::shared_ptr<ReaderShared> shared_;
};

double monotonic_s();

// A Ring that another thread can wake out of complete().
class WakeableRing : public Ring {
 public:
  virtual void wake() = 0;
};

struct RingSetup {
  unsigned depth = 8;
  std::shared_ptr<Arena> arena;
  bool strict = false;
  // Writes down what did not work; false where that ends it.
  std::shared_ptr<FallbackLog> log;
};

struct RingFeatures {
  bool registered_buffers = false;
  bool registered_files = false;
  std::string detail;
};

// Each throws Error(kUnavailable) with the reason. The io_uring one is used by the thread that made it only.
std::unique_ptr<WakeableRing> make_thread_ring(const RingSetup& setup, RingFeatures& features);
std::unique_ptr<WakeableRing> make_uring_ring(const RingSetup& setup, RingFeatures& features);
// Empty where io_uring works in this process; otherwise why not.
std::string why_no_uring();

// No registered piece of an arena crosses a multiple of this, and no read does.
constexpr uint64_t kRegisteredPieceBytes = 1ull << 30;

}  // namespace mhaffn
