// What drives an engine core on a real machine: io_uring, or threads that call preadv.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "engine_core.h"
#include "file.h"
#include "pinned.h"

namespace mhaffn {

enum class EngineKind { kAuto, kUring, kThreads };

// A Ring that another thread can wake out of complete().
class WakeableRing : public Ring {
 public:
  virtual void wake() = 0;
  // Why it will never take anything again, with the errno; null while it works.
  virtual const Failure* refusal() const { return nullptr; }
  // Of a ring that takes nothing again: whether the kernel has this read already, and may go on with it.
  virtual bool holds(uint64_t) const { return false; }
};

struct RingSetup {
  unsigned depth = 16;
  std::shared_ptr<Arena> arena;
  // Writes down what did not work; false where that ends it.
  std::shared_ptr<FallbackLog> log;
};

struct RingFeatures {
  bool registered_buffers = false;
  bool registered_files = false;
  std::string detail;
};

// Each throws Error(kUnavailable) with the reason. The io_uring one is used by the thread that made it only.
std::unique_ptr<WakeableRing> make_thread_ring(const RingSetup& setup, RingFeatures& features);
std::unique_ptr<WakeableRing> make_uring_ring(const RingSetup& setup, RingFeatures& features);
// Empty where io_uring works in this process; otherwise why not.
std::string why_no_uring();

// No registered piece of an arena crosses a multiple of this, and no read does.
constexpr uint64_t kRegisteredPieceBytes = 1ull << 30;

}  // namespace mhaffn
