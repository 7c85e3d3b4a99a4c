#include "router.h"

#include <sys/sysmacros.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "clock.h"

namespace mhaffn {

Router::Router(const ReaderOptions& options, std::shared_ptr<Arena> arena, EngineKind engine,
               std::shared_ptr<Reasons> reasons)
    : options_(options),
      engine_(engine),
      arena_(std::move(arena)),
      reasons_(std::move(reasons)),
      files_(options.direct, reasons_) {}

void Router::start() {
  router_.start([self = shared_from_this()] { self->route_all(); });
}

void Router::submit(const std::shared_ptr<Request>& request) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closing_) fail_closed();
  live_[request.get()] = request;
  queue_.push_back(request);
  work_.notify_one();
}

void Router::over(const Request* request) {
  std::lock_guard<std::mutex> lock(mutex_);
  live_.erase(request);
}

void Router::poke_all() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [key, device] : devices_) device->poke();
}

uint64_t Router::close() {
  std::vector<std::shared_ptr<Request>> requests;
  std::vector<std::shared_ptr<DeviceThread>> devices;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (std::exchange(closing_, true)) {
      closed_change_.wait(lock, [&] { return closed_; });
      return 0;
    }
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
  for (const auto& request : requests) request->abandon();
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  closed_change_.notify_all();
  return leaked_bytes_;
}

ReaderInfo Router::info() const {
  ReaderInfo info;
  info.liburing = Reader::liburing();
  info.reasons = reasons_->all();
  info.leaked_bytes = leaked_bytes_;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [key, device] : devices_) info.devices.push_back(device->info());
  }
  bool uring = false, direct = false, buffered = reasons_->any_lost_direct_reads();
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

std::vector<std::shared_ptr<Request>> Router::live() const {
  std::vector<std::shared_ptr<Request>> requests;
  for (const auto& [key, weak] : live_) {
    if (auto request = weak.lock()) requests.push_back(std::move(request));
  }
  return requests;
}

void Router::route_all() {
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
      const auto* system = dynamic_cast<const std::system_error*>(&error);
      request->fail(request->failure(ErrorKind::kRead, "submit", system ? system->code().value() : 0,
                                     std::string("the read could not be started: ") + error.what()));
      request->expect_parts(0);
    }
    request.reset();
    lock.lock();
  }
  files_.clear();
}

void Router::route(const std::shared_ptr<Request>& request) {
  if (request->stopped() || request->done()) return request->expect_parts(0);
  std::map<DeviceKey, std::shared_ptr<Part>> parts;
  std::shared_ptr<Lease> lease = request->lease();
  const uint64_t start = lease->offset() + request->slot_offset_;
  std::shared_ptr<File> file;
  for (const Cover& cover : request->layout_.covers) {
    // One version of a file for all of a request: another may be put in its place meanwhile.
    if (!file || file->path() != cover.path) file = files_.get(cover.path);
    auto& part = parts[{file->identity().device, file->direct()}];
    if (!part) part = std::make_shared<Part>(request);
    for (uint64_t at = 0; at < cover.length;) {
      const uint64_t place = start + cover.position + at;
      const uint64_t to_boundary = kRegisteredPieceBytes - place % kRegisteredPieceBytes;
      const auto length = static_cast<uint32_t>(
          std::min({static_cast<uint64_t>(options_.block_bytes), cover.length - at, to_boundary}));
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

std::shared_ptr<DeviceThread> Router::device(const DeviceKey& key) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closing_) fail_closed();
  auto& device = devices_[key];
  if (!device) {
    // Buffered reads copy: threads spread the copying, one ring would not.
    const EngineKind engine = options_.engine == EngineKind::kAuto && !key.second ? EngineKind::kThreads : engine_;
    device = std::make_shared<DeviceThread>(std::to_string(major(key.first)) + ":" + std::to_string(minor(key.first)),
                                            key.second, engine,
                                            RingSetup{static_cast<unsigned>(options_.depth), arena_, reasons_});
    try {
      DeviceThread::start(device);
    } catch (...) {
      devices_.erase(key);  // the next request tries again
      throw;
    }
  }
  return device;
}

}  // namespace mhaffn
