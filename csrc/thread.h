// A thread that can be given up: what it uses it owns.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "clock.h"

namespace mhaffn {

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

}  // namespace mhaffn
