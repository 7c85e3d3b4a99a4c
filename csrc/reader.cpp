#include "reader.h"

#include <sys/sysmacros.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <map>
#include <stdexcept>
#include <thread>
#include <unordered_map>

namespace mhaffn {

double monotonic_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Layout lay_out(const std::vector<Extent>& extents) {
  Layout layout;
  layout.placements.resize(extents.size());
  std::vector<std::string> paths;
  std::unordered_map<std::string, std::vector<size_t>> by_path;
  for (size_t i = 0; i < extents.size(); ++i) {
    const Extent& extent = extents[i];
    constexpr uint64_t kEnd = INT64_MAX - kPageBytes;
    if (extent.offset > kEnd || extent.length > kEnd - extent.offset) {
      throw std::invalid_argument(extent.path + ": bytes " + std::to_string(extent.offset) + " + " +
                                  std::to_string(extent.length) + " pass the range of file offsets");
    }
    layout.extent_bytes += extent.length;
    if (extent.length == 0) continue;
    auto& indices = by_path[extent.path];
    if (indices.empty()) paths.push_back(extent.path);
    indices.push_back(i);
  }
  for (const std::string& path : paths) {
    auto& indices = by_path[path];
    std::stable_sort(indices.begin(), indices.end(),
                     [&](size_t a, size_t b) { return extents[a].offset < extents[b].offset; });
    const size_t first = layout.covers.size();
    for (size_t i : indices) {
      const uint64_t begin = extents[i].offset / kPageBytes * kPageBytes;
      const uint64_t end = extents[i].offset + extents[i].length;
      const bool joins =
          layout.covers.size() > first && begin <= layout.covers.back().offset + layout.covers.back().length;
      if (!joins) layout.covers.push_back({path, begin, 0, 0, layout.cover_bytes});
      Cover& cover = layout.covers.back();
      cover.need = std::max(cover.need, end - cover.offset);
      cover.length = round_up(cover.need, kPageBytes);
      layout.cover_bytes = cover.position + cover.length;
      layout.placements[i] = cover.position + (extents[i].offset - cover.offset);
    }
  }
  return layout;
}

namespace {

class Reasons : public FallbackLog {
 public:
  explicit Reasons(bool strict) : strict_(strict) {}

  bool allow(const std::string& reason) override {
    if (strict_) return false;
    std::lock_guard<std::mutex> lock(mutex_);
    const bool known = std::find(reasons_.begin(), reasons_.end(), reason) != reasons_.end();
    if (!known && reasons_.size() < kCapacity) reasons_.push_back(reason);
    return true;
  }

  std::vector<std::string> all() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return reasons_;
  }

 private:
  static constexpr size_t kCapacity = 64;
  const bool strict_;
  mutable std::mutex mutex_;
  std::vector<std::string> reasons_;
};

// A thread that can be given up: what it uses it owns.
class Thread {
 public:
  ~Thread() {
    if (thread_.joinable()) thread_.detach();
  }

  template <typename Function>
  void start(Function function) {
    auto ended = ended_;
    thread_ = std::thread([function = std::move(function), ended]() mutable {
      function();
      std::lock_guard<std::mutex> lock(ended->mutex);
      ended->yes = true;
      ended->change.notify_all();
    });
  }

  void join_until(double deadline_s) {
    if (!thread_.joinable()) return;
    std::unique_lock<std::mutex> lock(ended_->mutex);
    const auto left = std::chrono::duration<double>(deadline_s - monotonic_s());
    const bool ended = ended_->change.wait_for(lock, left, [&] { return ended_->yes; });
    lock.unlock();
    if (ended) {
      thread_.join();
    } else {
      thread_.detach();
    }
  }

 private:
  struct Ended {
    std::mutex mutex;
    std::condition_variable change;
    bool yes = false;
  };
  std::shared_ptr<Ended> ended_ = std::make_shared<Ended>();
  std::thread thread_;
};

}  // namespace

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
  void drained(double now) override { request_->part_drained(now); }

 private:
  std::shared_ptr<Request> request_;
  std::vector<std::shared_ptr<File>> files_;
  std::vector<Piece> pieces_;
  std::vector<size_t> runs_;
};

// One device: a thread that drives an engine core over a ring.
class DeviceThread {
 public:
  DeviceThread(std::string device, bool direct, EngineKind engine, RingSetup setup)
      : device_(std::move(device)), direct_(direct), engine_(engine), setup_(std::move(setup)) {}

  static void start(const std::shared_ptr<DeviceThread>& self) {
    self->thread_.start([self] { self->run(); });
  }

  void add(std::shared_ptr<Job> job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(std::move(job));
      if (!hungry_) return;  // it looks for jobs after each completion
    }
    poke();
  }

  // Makes it look for new and stopped jobs now.
  void poke() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!poked_ && ring_) ring_->wake();
    poked_ = true;
    change_.notify_all();
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    poke();
  }

  void join_until(double deadline_s) { thread_.join_until(deadline_s); }

  DeviceInfo info() const {
    std::lock_guard<std::mutex> lock(mutex_);
    DeviceInfo info = info_;
    info.device = device_;
    info.direct = direct_;
    info.bytes_read = counts_.bytes_read;
    info.busy_s = counts_.busy_s;
    info.retries = counts_.retries;
    return info;
  }

 private:
  void run() {
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
    for (;;) {
      if (take(core) && core.idle()) break;
      const double due = core.fill();
      {
        std::lock_guard<std::mutex> lock(mutex_);
        hungry_ = core.hungry();
      }
      core.finish_until(due);
    }
    publish(nullptr);
  }

  std::unique_ptr<WakeableRing> make_ring() {
    RingFeatures features;
    std::unique_ptr<WakeableRing> ring;
    const char* name = "threads";
#ifdef MHAFFN_HAS_LIBURING
    if (engine_ != EngineKind::kThreads) {
      try {
        ring = make_uring_ring(setup_, features);
        name = "io_uring";
      } catch (const Error& error) {
        if (engine_ == EngineKind::kUring || !setup_.log->allow(std::string(error.what()) + ": preadv threads")) throw;
        features = {};
      }
    }
#endif
    if (!ring) ring = make_thread_ring(setup_, features);
    std::lock_guard<std::mutex> lock(mutex_);
    info_.engine = name;
    info_.registered_buffers = features.registered_buffers;
    info_.registered_files = features.registered_files;
    info_.detail = features.detail;
    return ring;
  }

  void publish(WakeableRing* ring) {
    std::lock_guard<std::mutex> lock(mutex_);
    ring_ = ring;
    if (ring && poked_) ring->wake();
  }

  // Moves new jobs into the core; true when stopping.
  bool take(EngineCore& core) {
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

  // Without a ring every job fails, until the reader is closed.
  void fail_all(const Failure& failure) {
    for (;;) {
      std::vector<std::shared_ptr<Job>> jobs;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        info_.detail = failure.message;
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

  static constexpr double kStallS = 30.0;

  const std::string device_;
  const bool direct_;
  const EngineKind engine_;
  RingSetup setup_;
  mutable std::mutex mutex_;
  std::condition_variable change_;  // for when there is no ring to wake
  std::vector<std::shared_ptr<Job>> jobs_;
  WakeableRing* ring_ = nullptr;
  bool poked_ = false;
  bool stopping_ = false;
  bool hungry_ = true;  // a new job could be started at once
  DeviceInfo info_;
  CoreCounts counts_;
  Thread thread_;
};

// What the reader, its threads and its requests share. A router thread opens files, so that submit() never waits
// for a file system, and hands each request's parts to their devices.
class ReaderShared : public std::enable_shared_from_this<ReaderShared> {
 public:
  ReaderShared(const ReaderOptions& options, std::shared_ptr<Arena> arena, EngineKind engine,
               std::shared_ptr<Reasons> reasons)
      : options_(options),
        engine_(engine),
        arena_(std::move(arena)),
        reasons_(std::move(reasons)),
        files_(options.direct, reasons_) {}

  void start() {
    router_.start([self = shared_from_this()] { self->route_all(); });
  }

  void submit(const std::shared_ptr<Request>& request) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) {
      Failure failure;
      failure.kind = ErrorKind::kCancelled;
      failure.op = "submit";
      failure.message = "the reader is closed";
      throw Error(std::move(failure));
    }
    live_[request.get()] = request;
    queue_.push_back(request);
    work_.notify_one();
  }

  void over(const Request* request) {
    std::lock_guard<std::mutex> lock(mutex_);
    live_.erase(request);
  }

  // A request stopped: wherever its parts are, they need not be read.
  void poke_all() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [key, device] : devices_) device->poke();
  }

  void progressed(double now) { last_progress_s_.store(now, std::memory_order_relaxed); }
  double last_progress_s() const { return last_progress_s_.load(std::memory_order_relaxed); }

  uint64_t close() {
    std::vector<std::shared_ptr<Request>> requests;
    std::vector<std::shared_ptr<DeviceThread>> devices;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (std::exchange(closing_, true)) return 0;
      requests = live();
      work_.notify_all();
    }
    const double deadline = monotonic_s() + options_.close_limit_s;
    for (const auto& request : requests) request->cancel();
    router_.join_until(deadline);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (auto& [key, device] : devices_) devices.push_back(device);
      arena_.reset();
    }
    for (const auto& device : devices) device->stop();
    for (const auto& device : devices) device->join_until(deadline);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      requests = live();
    }
    uint64_t leaked = 0;
    for (const auto& request : requests) {
      leaked += request->layout().cover_bytes;
      request->abandon();
    }
    leaked_bytes_ += leaked;
    return leaked;
  }

  ReaderInfo info() const {
    ReaderInfo info;
    info.liburing = Reader::liburing();
    info.reasons = reasons_->all();
    info.leaked_bytes = leaked_bytes_;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& [key, device] : devices_) info.devices.push_back(device->info());
    }
    bool uring = false, direct = false, buffered = false;
    for (const DeviceInfo& device : info.devices) {
      uring = uring || device.engine == "io_uring";
      (device.direct ? direct : buffered) = true;
      info.registered_buffers = info.registered_buffers || device.registered_buffers;
      info.bytes_read += device.bytes_read;
      info.busy_s += device.busy_s;
    }
    if (info.devices.empty()) {
      uring = engine_ != EngineKind::kThreads;
      direct = options_.direct != Direct::kOff;
    }
    info.engine = uring ? "io_uring" : "threads";
    info.direct = !direct ? "off" : buffered ? "mixed" : "on";
    return info;
  }

 private:
  using DeviceKey = std::pair<dev_t, bool>;

  std::vector<std::shared_ptr<Request>> live() const {
    std::vector<std::shared_ptr<Request>> requests;
    for (const auto& [key, weak] : live_) {
      if (auto request = weak.lock()) requests.push_back(std::move(request));
    }
    return requests;
  }

  void route_all() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [&] { return closing_ || !queue_.empty(); });
      if (queue_.empty()) break;
      auto request = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      try {
        route(request);
      } catch (const Error& error) {
        request->fail(error.failure());
        request->expect_parts(0);
      } catch (const std::exception& error) {
        Failure failure;
        failure.op = "submit";
        failure.message = std::string("the read could not be started: ") + error.what();
        request->fail(std::move(failure));
        request->expect_parts(0);
      }
      request.reset();
      lock.lock();
    }
    files_.clear();
  }

  void route(const std::shared_ptr<Request>& request) {
    if (request->stopped() || request->done()) return request->expect_parts(0);
    std::map<DeviceKey, std::shared_ptr<Part>> parts;
    std::shared_ptr<Lease> lease = request->lease();
    const uint64_t start = lease->offset() + request->slot_offset_;
    for (const Cover& cover : request->layout_.covers) {
      const std::shared_ptr<File> file = files_.get(cover.path);
      auto& part = parts[{file->identity().device, file->direct()}];
      if (!part) part = std::make_shared<Part>(request);
      for (uint64_t at = 0; at < cover.length;) {
        const uint64_t place = start + cover.position + at;
        const uint64_t to_boundary = kRegisteredPieceBytes - place % kRegisteredPieceBytes;
        const auto length =
            static_cast<uint32_t>(std::min({uint64_t{options_.block_bytes}, cover.length - at, to_boundary}));
        const auto need = static_cast<uint32_t>(std::min<uint64_t>(length, cover.need - at));
        part->add(file, {file.get(), cover.offset + at, lease->arena()->address() + place, length, need},
                  request->runs_.size());
        request->runs_.push_back({cover.position + at, length, need, 0});
        at += length;
      }
    }
    std::vector<std::pair<std::shared_ptr<DeviceThread>, std::shared_ptr<Part>>> placed;
    for (auto& [key, part] : parts) placed.emplace_back(device(key), std::move(part));
    lease.reset();  // once its parts are placed the request may end, and with it the memory be leased again
    request->expect_parts(placed.size());
    for (auto& [device, part] : placed) device->add(std::move(part));
  }

  std::shared_ptr<DeviceThread> device(const DeviceKey& key) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) throw std::runtime_error("the reader is closed");
    auto& device = devices_[key];
    if (!device) {
      // Buffered reads copy: threads spread the copying, one ring would not.
      const EngineKind engine = options_.engine == EngineKind::kAuto && !key.second ? EngineKind::kThreads : engine_;
      device = std::make_shared<DeviceThread>(std::to_string(major(key.first)) + ":" + std::to_string(minor(key.first)),
                                              key.second, engine,
                                              RingSetup{options_.depth, arena_, options_.strict, reasons_});
      DeviceThread::start(device);
    }
    return device;
  }

  const ReaderOptions options_;
  const EngineKind engine_;
  std::shared_ptr<Arena> arena_;
  const std::shared_ptr<Reasons> reasons_;
  FileCache files_;
  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::deque<std::shared_ptr<Request>> queue_;
  std::unordered_map<const Request*, std::weak_ptr<Request>> live_;
  std::map<DeviceKey, std::shared_ptr<DeviceThread>> devices_;
  bool closing_ = false;
  std::atomic<uint64_t> leaked_bytes_{0};
  std::atomic<double> last_progress_s_{0.0};
  Thread router_;
};

Request::Request(std::shared_ptr<ReaderShared> reader, Layout layout, std::shared_ptr<Lease> lease,
                 uint64_t slot_offset)
    : reader_(std::move(reader)), layout_(std::move(layout)), slot_offset_(slot_offset), lease_(std::move(lease)) {}

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
  reader_->progressed(now);
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
  if (others) reader_->poke_all();
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
  if (keep_lease && lease) Arena::leak(lease);
  lease.reset();  // before waiters wake: they may lease the same bytes at once
  {
    std::lock_guard<std::mutex> lock(mutex_);
    finished_s_ = now;
    done_.store(true, std::memory_order_release);
    change_.notify_all();
  }
  reader_->over(this);
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
  const double start = monotonic_s();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!done_ && ready_ < nbytes) {
    const double now = monotonic_s();
    const double limit =
        timeout_s ? start + *timeout_s : std::max(start, reader_->last_progress_s()) + kNoProgressLimitS;
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

void Request::time_out(double waited_s) const {
  Failure failure;
  failure.kind = ErrorKind::kTimeout;
  failure.op = "wait";
  if (!layout_.covers.empty()) {
    failure.path = layout_.covers.front().path;
    failure.offset = layout_.covers.front().offset;
  }
  failure.length = layout_.extent_bytes;
  failure.message = failure.path + ": not read within " + std::to_string(waited_s) + " s: " + std::to_string(ready_) +
                    " of " + std::to_string(layout_.cover_bytes) +
                    " bytes are there; the read goes on: wait again, or cancel it";
  throw Error(std::move(failure));
}

void Request::cancel() {
  owner_.require("this Request");
  if (done()) return;
  Failure failure;
  failure.kind = ErrorKind::kCancelled;
  failure.op = "cancel";
  if (!layout_.covers.empty()) {
    failure.path = layout_.covers.front().path;
    failure.offset = layout_.covers.front().offset;
  }
  failure.length = layout_.extent_bytes;
  failure.message = failure.path + ": the read was cancelled, or its reader closed, before it completed";
  fail(std::move(failure));
  reader_->poke_all();
}

Reader::Reader(const ReaderOptions& options, std::shared_ptr<Arena> arena) {
  if (options.block_bytes < kPageBytes || options.block_bytes % kPageBytes != 0 ||
      options.block_bytes > kRegisteredPieceBytes) {
    throw std::invalid_argument("block_bytes is a multiple of 4096 up to 1 GiB, got " +
                                std::to_string(options.block_bytes));
  }
  constexpr unsigned kLargestDepth = 256;
  if (options.depth < 1 || options.depth > kLargestDepth) {
    throw std::invalid_argument("depth lies between 1 and 256, got " + std::to_string(options.depth));
  }
  if (arena) arena->owner().require("this PinnedArena");
  auto reasons = std::make_shared<Reasons>(options.strict);
  EngineKind engine = options.engine;
  if (engine != EngineKind::kThreads) {
#ifdef MHAFFN_HAS_LIBURING
    const std::string reason = why_no_uring();
#else
    const std::string reason = "mhaffn was built without liburing: apt-get install liburing-dev, then install it again";
#endif
    if (!reason.empty()) {
      if (engine == EngineKind::kUring || !reasons->allow(reason + ": preadv threads")) {
        fail_unavailable(reason + "; engine=\"threads\" works without it");
      }
      engine = EngineKind::kThreads;
    }
  }
  shared_ = std::make_shared<ReaderShared>(options, std::move(arena), engine, std::move(reasons));
  shared_->start();
}

Reader::~Reader() {
  if (owner_.is_current()) {
    close();
  } else {
    new std::shared_ptr<ReaderShared>(std::move(shared_));  // its threads and locks are the parent's
  }
}

std::shared_ptr<Request> Reader::submit(std::vector<Extent> extents, std::shared_ptr<Lease> lease,
                                        uint64_t slot_offset) {
  owner_.require("this Reader");
  Layout layout = lay_out(extents);
  if (slot_offset % kPageBytes != 0) {
    throw std::invalid_argument("slot_offset is a multiple of 4096, got " + std::to_string(slot_offset));
  }
  if (slot_offset > lease->nbytes() || layout.cover_bytes > lease->nbytes() - slot_offset) {
    throw std::invalid_argument("the slot is too small: the extents need " + std::to_string(layout.cover_bytes) +
                                " bytes from offset " + std::to_string(slot_offset) + ", it has " +
                                std::to_string(lease->nbytes()));
  }
  auto request = std::make_shared<Request>(shared_, std::move(layout), std::move(lease), slot_offset);
  shared_->submit(request);
  return request;
}

ReaderInfo Reader::info() const {
  owner_.require("this Reader");
  return shared_->info();
}

uint64_t Reader::close() {
  owner_.require("this Reader");
  return shared_->close();
}

const char* Reader::liburing() { return MHAFFN_LIBURING; }

}  // namespace mhaffn
