// Steps down from what was asked for: each is allowed or not, and recorded with its reason.
#pragma once

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <vector>

namespace mhaffn {

// What falls back, and why. Called from any thread; throws or returns false where falling back is not allowed.
class FallbackLog {
 public:
  virtual ~FallbackLog() = default;
  // True where the step down may be taken; it is then recorded.
  virtual bool allow(const std::string& reason) = 0;
  // A file that was read directly is read through the page cache from here on.
  virtual void lost_direct_reads() {}
};

// What a reader reports; allows nothing where it is strict.
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

  void lost_direct_reads() override { lost_direct_reads_.store(true, std::memory_order_relaxed); }

  bool any_lost_direct_reads() const { return lost_direct_reads_.load(std::memory_order_relaxed); }

  std::vector<std::string> all() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return reasons_;
  }

 private:
  static constexpr size_t kCapacity = 64;
  const bool strict_;
  std::atomic<bool> lost_direct_reads_{false};
  mutable std::mutex mutex_;
  std::vector<std::string> reasons_;
};

}  // namespace mhaffn
