// Steps down from what was asked for: each is allowed or not, and recorded with its reason.
#pragma once

#include <algorithm>
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

}  // namespace mhaffn
