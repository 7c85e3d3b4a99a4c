// One submit(): its progress, its end, and those who wait for it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "engine_core.h"
#include "file.h"
#include "layout.h"
#include "pinned.h"
#include "process.h"

namespace mhaffn {

class Router;

// One submit(): what arrives, and what went wrong first. Shared by the caller and the threads that read.
class Request {
 public:
  static constexpr double kNoProgressLimitS = 60.0;
  // Called between slices of a wait without a lock held; throws to end the wait.
  using Interrupt = std::function<void()>;

  Request(std::shared_ptr<Router> router, Layout layout, std::shared_ptr<Lease> lease, uint64_t slot_offset);

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
  friend class Router;
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
  // What became of the request as a whole; the message begins with its first file.
  Failure failure(ErrorKind kind, const char* op, int error, const std::string& message) const;
  void part_drained(double now);
  // It is over, but something may still write to its memory: the lease is never given back.
  void abandon();
  void finish(double now, bool keep_lease);
  uint64_t wait_until(uint64_t nbytes, std::optional<double> timeout_s, const Interrupt& interrupt);
  [[noreturn]] void time_out(double waited_s) const;

  const Process owner_;
  const std::shared_ptr<Router> router_;
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

// The pieces of a request on one device.
class Part : public Job {
 public:
  explicit Part(std::shared_ptr<Request> request) : request_(std::move(request)) {}

  void add(const std::shared_ptr<File>& file, const Piece& piece, size_t run) {
    if (files_.empty() || files_.back() != file) files_.push_back(file);
    pieces_.push_back(piece);
    runs_.push_back(run);
  }

  const std::vector<Piece>& pieces() const override { return pieces_; }
  bool stopped() const override { return request_->stopped(); }
  void started(double now) override { request_->started(now); }
  void progressed(size_t piece, uint32_t done, double now) override { request_->progressed(runs_[piece], done, now); }
  void failed(Failure failure) override { request_->fail(std::move(failure)); }
  void lost() override { request_->abandon(); }
  void drained(double now) override { request_->part_drained(now); }

 private:
  std::shared_ptr<Request> request_;
  std::vector<std::shared_ptr<File>> files_;
  std::vector<Piece> pieces_;
  std::vector<size_t> runs_;
};

}  // namespace mhaffn
