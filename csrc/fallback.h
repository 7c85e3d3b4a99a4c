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
  // True where the step down may be taken; it is then recorded, for the file at `path` or for all reads.
  virtual bool allow(const std::string& reason, const std::string& path) = 0;
  // A file that was read directly is read through the page cache from here on.
  virtual void lost_direct_reads() {}
};

// What a reader reports; allows nothing where it is strict.
class Reasons : public FallbackLog {
 public:
  explicit Reasons(bool strict) : strict_(strict) {}

  bool allow(const std::string& reason, const std::string& path) override {
    if (strict_) return false;
    std::lock_guard<std::mutex> lock(mutex_);
    auto step = std::find_if(steps_.begin(), steps_.end(), [&](const Step& known) { return known.reason == reason; });
    if (step == steps_.end()) step = steps_.insert(step, {reason, path, false});
    step->others |= step->path != path;
    return true;
  }

  void lost_direct_reads() override { lost_direct_reads_.store(true, std::memory_order_relaxed); }

  bool any_lost_direct_reads() const { return lost_direct_reads_.load(std::memory_order_relaxed); }

  std::vector<std::string> all() const {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::string> found;
    for (const Step& step : steps_) {
      const std::string where = step.path.empty() ? "" : step.path + (step.others ? " and other files: " : ": ");
      found.push_back(where + step.reason);
    }
    return found;
  }

 private:
  // A cause, and the first file it met.
  struct Step {
    std::string reason, path;
    bool others;
  };
  const bool strict_;
  std::atomic<bool> lost_direct_reads_{false};
  mutable std::mutex mutex_;
  std::vector<Step> steps_;
};

}  // namespace mhaffn
