#include "request.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "clock.h"
#include "router.h"

namespace mhaffn {

Request::Request(std::shared_ptr<Router> router, Layout layout, std::shared_ptr<Lease> lease, uint64_t slot_offset)
    : router_(std::move(router)), layout_(std::move(layout)), slot_offset_(slot_offset), lease_(std::move(lease)) {}

void Request::expect_parts(size_t count) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    parts_ = count;
  }
  if (count == 0) finish(monotonic_s(), false);
}

void Request::started(double now) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (started_s_ == 0.0) started_s_ = now;
}

void Request::progressed(size_t run, uint32_t done, double now) {
  router_->progressed(now);
  std::lock_guard<std::mutex> lock(mutex_);
  runs_[run].done = done;
  while (first_unready_ < runs_.size() && runs_[first_unready_].done >= runs_[first_unready_].need) ++first_unready_;
  uint64_t ready;
  if (first_unready_ == runs_.size()) {
    ready = runs_.back().position + runs_.back().need;
  } else {
    ready = runs_[first_unready_].position + runs_[first_unready_].done;
  }
  ready_.store(ready, std::memory_order_release);
  if (ready >= wake_at_) {
    wake_at_ = UINT64_MAX;
    change_.notify_all();
  }
}

void Request::fail(Failure failure) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!failure_) failure_ = std::move(failure);
  stopped_.store(true, std::memory_order_release);
}

void Request::part_drained(double now) {
  bool last, others;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    last = --parts_ == 0;
    others = !last && stopped();
  }
  if (last) finish(now, false);
  if (others) router_->poke_all();
}

void Request::abandon() { finish(monotonic_s(), true); }

void Request::finish(double now, bool keep_lease) {
  std::shared_ptr<Lease> lease;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (finishing_) return;
    finishing_ = true;
    lease = std::move(lease_);
  }
  if (keep_lease && lease) {
    Arena::leak(lease);
    router_->leaked(layout_.cover_bytes);
  }
  lease.reset();  // before waiters wake: they may lease the same bytes at once
  {
    std::lock_guard<std::mutex> lock(mutex_);
    finished_s_ = now;
    done_.store(true, std::memory_order_release);
    change_.notify_all();
  }
  router_->over(this);
}

std::shared_ptr<Lease> Request::lease() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return lease_;
}

double Request::started_s() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return started_s_;
}

double Request::finished_s() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return finished_s_;
}

void Request::wait(std::optional<double> timeout_s, const Interrupt& interrupt) {
  wait_until(UINT64_MAX, timeout_s, interrupt);
}

uint64_t Request::wait_ready(uint64_t nbytes, std::optional<double> timeout_s, const Interrupt& interrupt) {
  return wait_until(nbytes, timeout_s, interrupt);
}

uint64_t Request::wait_until(uint64_t nbytes, std::optional<double> timeout_s, const Interrupt& interrupt) {
  constexpr double kSliceS = 0.1;
  owner_.require("this Request");
  if (timeout_s && std::isnan(*timeout_s)) throw std::invalid_argument("timeout: got a value that is no number");
  const double start = monotonic_s();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!done_ && ready_ < nbytes) {
    const double now = monotonic_s();
    const double limit =
        timeout_s ? start + *timeout_s : std::max(start, router_->last_progress_s()) + kNoProgressLimitS;
    if (now >= limit) time_out(now - start);
    wake_at_ = std::min(wake_at_, nbytes);
    const double wait_s = std::min(limit - now, kSliceS);
    if (change_.wait_for(lock, std::chrono::duration<double>(wait_s)) == std::cv_status::timeout) {
      lock.unlock();
      interrupt();
      lock.lock();
    }
  }
  if (done_ && failure_) throw Error(*failure_);
  return ready_;
}

Failure Request::failure(ErrorKind kind, const char* op, int error, const std::string& message) const {
  Failure failure;
  failure.kind = kind;
  failure.op = op;
  failure.error = error;
  if (!layout_.covers.empty()) {
    failure.path = layout_.covers.front().path;
    failure.offset = layout_.covers.front().offset;
  }
  failure.length = layout_.extent_bytes;
  failure.message = failure.path + ": " + message;
  return failure;
}

void Request::time_out(double waited_s) const {
  throw Error(failure(ErrorKind::kTimeout, "wait", 0,
                      "not read within " + std::to_string(waited_s) + " s: " + std::to_string(ready_) + " of " +
                          std::to_string(layout_.cover_bytes) +
                          " bytes are there; the read goes on: wait again, or cancel it"));
}

void Request::cancel() {
  owner_.require("this Request");
  if (done()) return;
  fail(
      failure(ErrorKind::kCancelled, "cancel", 0, "the read was cancelled, or its reader closed, before it completed"));
  router_->poke_all();
}

}  // namespace mhaffn
