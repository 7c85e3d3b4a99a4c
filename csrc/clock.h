// The one clock of requests, threads and limits: seconds, as Python's time.perf_counter() counts them.
#pragma once

#include <chrono>

namespace mhaffn {

inline double monotonic_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace mhaffn
