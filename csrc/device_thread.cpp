#include "device_thread.h"

#include <utility>

#include "clock.h"

namespace mhaffn {

DeviceThread::DeviceThread(std::string device, bool direct, EngineKind engine, RingSetup setup)
    : device_(std::move(device)), direct_(direct), engine_(engine), setup_(std::move(setup)) {}

void DeviceThread::start(const std::shared_ptr<DeviceThread>& self) {
  self->thread_.start([self] { self->run(); });
}

void DeviceThread::add(std::shared_ptr<Job> job) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(std::move(job));
    if (!hungry_) return;  // it looks for jobs after each completion
  }
  poke();
}

void DeviceThread::poke() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!poked_ && ring_) ring_->wake();
  poked_ = true;
  change_.notify_all();
}

void DeviceThread::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  poke();
}

DeviceInfo DeviceThread::info() const {
  std::lock_guard<std::mutex> lock(mutex_);
  DeviceInfo info = info_;
  info.device = device_;
  info.direct = direct_;
  info.bytes_read = counts_.bytes_read;
  info.busy_s = counts_.busy_s;
  info.retries = counts_.retries;
  return info;
}

void DeviceThread::run() {
  std::unique_ptr<WakeableRing> ring;
  Failure failure;
  try {
    ring = make_ring();
  } catch (const Error& error) {
    failure = error.failure();
  } catch (const std::exception& error) {
    failure.kind = ErrorKind::kUnavailable;
    failure.message = std::string("no engine could be started: ") + error.what();
  }
  setup_.arena.reset();  // the ring holds its pages for as long as it needs them
  if (!ring) return fail_all(failure);
  publish(ring.get());
  EngineCore core(*ring, {setup_.depth, kStallS}, counts_);
  while (ring) {
    if (take(core) && core.idle()) break;
    const double due = core.fill();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      hungry_ = core.hungry();
    }
    core.finish_until(due);
    if (ring->refusal()) step_down(core, ring, failure);
  }
  publish(nullptr);
  if (!ring) fail_all(failure);
}

std::unique_ptr<WakeableRing> DeviceThread::make_ring() {
  RingFeatures features;
  std::unique_ptr<WakeableRing> ring;
  const char* name = "threads";
#ifdef MHAFFN_HAS_LIBURING
  if (engine_ != EngineKind::kThreads) {
    try {
      ring = make_uring_ring(setup_, features);
      name = "io_uring";
    } catch (const Error& error) {
      if (engine_ == EngineKind::kUring || !setup_.log->allow(std::string(error.what()) + ": preadv threads", ""))
        throw;
      features = {};
    }
  }
#endif
  if (!ring) ring = make_thread_ring(setup_, features);
  std::lock_guard<std::mutex> lock(mutex_);
  describe(name, features);
  return ring;
}

void DeviceThread::step_down(EngineCore& core, std::unique_ptr<WakeableRing>& ring, Failure& failure) {
  failure = *ring->refusal();
  const int error = failure.error;
  const std::string reason = failure.message;
  const auto holds = [&](uint64_t token) { return ring->holds(token); };
  // Some rings go on telling how the reads end that they hold.
  const double deadline = monotonic_s() + kDrainS;
  while (core.any_in_flight(holds) && monotonic_s() < deadline) core.finish_until(deadline);

  std::unique_ptr<WakeableRing> next;
  RingFeatures features;
  try {
    if (engine_ == EngineKind::kUring || !setup_.log->allow(reason + ": preadv threads", "")) {
      failure.message += "; engine=\"threads\" works without it";
    } else {
      next = make_thread_ring(setup_, features);
    }
  } catch (const Error& no_threads) {
    failure = no_threads.failure();
  }
  core.leave_ring(error, reason, holds, next.get());
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ring_ = next.get();
    describe(next ? "threads" : info_.engine, features);
  }
  ring = std::move(next);
}

void DeviceThread::describe(const std::string& engine, const RingFeatures& features) {
  info_.engine = engine;
  info_.registered_buffers = features.registered_buffers;
  info_.registered_files = features.registered_files;
  info_.detail = features.detail;
}

void DeviceThread::publish(WakeableRing* ring) {
  std::lock_guard<std::mutex> lock(mutex_);
  ring_ = ring;
  if (ring && poked_) ring->wake();
}

bool DeviceThread::take(EngineCore& core) {
  std::vector<std::shared_ptr<Job>> jobs;
  bool poked, stopping;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    hungry_ = true;  // until the jobs that come now are counted
    poked = std::exchange(poked_, false);
    stopping = stopping_;
    jobs.swap(jobs_);
  }
  for (auto& job : jobs) core.add(std::move(job));
  if (poked) core.drop_stopped();
  return stopping;
}

void DeviceThread::fail_all(const Failure& failure) {
  for (;;) {
    std::vector<std::shared_ptr<Job>> jobs;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      info_.detail = failure.message;
      hungry_ = true;
      change_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
      poked_ = false;
      jobs.swap(jobs_);
      if (jobs.empty() && stopping_) return;
    }
    for (auto& job : jobs) {
      job->failed(failure);
      job->drained(monotonic_s());
    }
  }
}

}  // namespace mhaffn
