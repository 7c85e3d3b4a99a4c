#include "reader.h"

#include <stdexcept>
#include <system_error>
#include <utility>

#include "fallback.h"
#include "router.h"

namespace mhaffn {

Reader::Reader(const ReaderOptions& options, std::shared_ptr<Arena> arena) {
  constexpr int64_t kPage = kPageBytes, kLargestBlock = kRegisteredPieceBytes;
  if (options.block_bytes < kPage || options.block_bytes % kPage != 0 || options.block_bytes > kLargestBlock) {
    throw std::invalid_argument("block_bytes is a multiple of 4096 up to 1 GiB, got " +
                                std::to_string(options.block_bytes));
  }
  constexpr int64_t kLargestDepth = 256;
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
      if (engine == EngineKind::kUring || !reasons->allow(reason + ": preadv threads", "")) {
        fail_unavailable(reason + "; engine=\"threads\" works without it");
      }
      engine = EngineKind::kThreads;
    }
  }
  router_ = std::make_shared<Router>(options, std::move(arena), engine, std::move(reasons));
  try {
    router_->start();
  } catch (const std::system_error& error) {
    fail_unavailable(std::string("no thread could be started: ") + error.what(), error.code().value());
  }
}

Reader::~Reader() {
  if (owner_.is_current()) {
    close();
  } else {
    new std::shared_ptr<Router>(std::move(router_));  // its threads and locks are the parent's
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
  auto request = std::make_shared<Request>(router_, std::move(layout), std::move(lease), slot_offset);
  router_->submit(request);
  return request;
}

ReaderInfo Reader::info() const {
  owner_.require("this Reader");
  return router_->info();
}

uint64_t Reader::close() {
  owner_.require("this Reader");
  return router_->close();
}

const char* Reader::liburing() { return MHAFFN_LIBURING; }

}  // namespace mhaffn
