// The reader's contract: extents of files in, exact bytes in a slot or a typed error out.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "file.h"
#include "layout.h"
#include "pinned.h"
#include "request.h"
#include "rings.h"

namespace mhaffn {

struct ReaderOptions {
  EngineKind engine = EngineKind::kAuto;
  Direct direct = Direct::kAuto;
  bool strict = false;
  int64_t block_bytes = 4 << 20;
  int64_t depth = 16;
  double close_limit_s = 4.0;
};

struct DeviceInfo {
  std::string device;  // major:minor
  std::string engine;
  bool direct = false;
  bool registered_buffers = false;
  bool registered_files = false;
  std::string detail;
  uint64_t bytes_read = 0;
  double busy_s = 0.0;
  uint64_t retries = 0;
};

struct ReaderInfo {
  std::string engine;
  std::string direct;
  bool registered_buffers = false;
  std::vector<std::string> reasons;
  std::vector<DeviceInfo> devices;
  uint64_t bytes_read = 0;
  double busy_s = 0.0;
  uint64_t leaked_bytes = 0;
  std::string liburing;
};

// Reads into leased memory, one thread and one ring a device. Any thread may call it.
class Reader {
 public:
  // `arena`: registered with the ring, in pieces of at most 1 GiB. Throws Error(kUnavailable), std::invalid_argument.
  Reader(const ReaderOptions& options, std::shared_ptr<Arena> arena);
  ~Reader();

  // Never blocks. Throws std::invalid_argument where the slot is too small or the place is not aligned.
  std::shared_ptr<Request> submit(std::vector<Extent> extents, std::shared_ptr<Lease> lease, uint64_t slot_offset);
  ReaderInfo info() const;
  // Cancels and drains everything. What could not be drained in time is leaked; returns how many bytes ever were.
  uint64_t close();

  // "static", "shared" or "none".
  static const char* liburing();

 private:
  Process owner_;
  std::shared_ptr<Router> router_;
};

}  // namespace mhaffn
