// What a reader, its threads and its requests share. A thread of its own opens files, so that submit() never waits
// for a file system, and hands each request's parts to their devices.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device_thread.h"
#include "fallback.h"
#include "file.h"
#include "reader.h"
#include "request.h"
#include "thread.h"

namespace mhaffn {

class Router : public std::enable_shared_from_this<Router> {
 public:
  Router(const ReaderOptions& options, std::shared_ptr<Arena> arena, EngineKind engine,
         std::shared_ptr<Reasons> reasons);
  void start();

  // Throws Error(kCancelled) once closing.
  void submit(const std::shared_ptr<Request>& request);
  void over(const Request* request);
  // A request stopped: wherever its parts are, they need not be read.
  void poke_all();
  // Memory of a request is never used again.
  void leaked(uint64_t nbytes) { leaked_bytes_ += nbytes; }
  void progressed(double now) { last_progress_s_.store(now, std::memory_order_relaxed); }
  double last_progress_s() const { return last_progress_s_.load(std::memory_order_relaxed); }
  // Returns the bytes leaked, ever. A second call waits for the first and returns none.
  uint64_t close();
  ReaderInfo info() const;

 private:
  using DeviceKey = std::pair<dev_t, bool>;

  std::vector<std::shared_ptr<Request>> live() const;
  void route_all();
  void route(const std::shared_ptr<Request>& request);
  std::shared_ptr<DeviceThread> device(const DeviceKey& key);

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
  bool closed_ = false;
  std::condition_variable closed_change_;
  std::atomic<uint64_t> leaked_bytes_{0};
  std::atomic<double> last_progress_s_{0.0};
  Thread router_;
};

}  // namespace mhaffn
