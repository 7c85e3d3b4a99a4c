// The io_uring engine: one ring, used by the thread that made it.
#include <errno.h>
#include <liburing.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <thread>
#include <unordered_map>

#include "clock.h"
#include "rings.h"

namespace mhaffn {
namespace {

constexpr uint64_t kWakeToken = UINT64_MAX;
constexpr uint64_t kCancelToken = UINT64_MAX - 1;
constexpr unsigned kFileSlots = 256;
constexpr double kLeastHugePageShare = 0.5;
constexpr const char* kSetUpFailed = "io_uring set-up failed: ";

std::string explain(const char* what, int error) {
  std::string text = std::string(what) + errno_text(error);
  if (error == EPERM || error == ENOSYS) {
    text += ", blocked by a seccomp profile, kernel.io_uring_disabled or an old kernel";
  } else if (error == ENOMEM) {
    text += ", raise `ulimit -l`";
  }
  return text;
}

std::string explain_buffers(int error, size_t nbytes) {
  std::string text = "registering " + std::to_string(nbytes >> 20) + " MiB with io_uring failed: " + errno_text(error);
  rlimit limit;
  if (error == ENOMEM && getrlimit(RLIMIT_MEMLOCK, &limit) == 0) {
    text += ", memlock is limited to " + std::to_string(limit.rlim_cur >> 10) +
            " KiB: `ulimit -l unlimited`, or `* - memlock unlimited` in /etc/security/limits.conf";
  }
  return text + ": unregistered reads";
}

// A ring of the flags this kernel has; 0, or the errno.
int set_up(io_uring& ring, unsigned depth, std::string& detail) {
  struct Mode {
    unsigned flags;
    const char* name;
  };
  static constexpr Mode kModes[] = {{IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN, "deferred task work"},
                                    {IORING_SETUP_COOP_TASKRUN, "cooperative task work"},
                                    {0, "plain"}};
  int error = 0;
  for (const Mode& mode : kModes) {
    // A read and its cancellation in flight each, and the wake-up: never more completions than CQ entries.
    io_uring_params params = {};
    params.flags = mode.flags | IORING_SETUP_CQSIZE;
    params.cq_entries = 4 * depth + 8;
    error = -io_uring_queue_init_params(2 * depth + 4, &ring, &params);
    if (error == 0 && !(params.features & IORING_FEAT_EXT_ARG)) {
      io_uring_queue_exit(&ring);
      return ENOSYS;  // before Linux 5.11: no waits with a time limit
    }
    detail = mode.name;
    if (error != EINVAL) return error;
  }
  return error;
}

class UringRing : public WakeableRing {
 public:
  UringRing(const RingSetup& setup, RingFeatures& features) : wake_fd_(eventfd(0, EFD_CLOEXEC)) {
    if (!wake_fd_) fail_unavailable("eventfd failed: " + errno_text(errno), errno);
    if (const int error = set_up(ring_, setup.depth, features.detail))
      fail_unavailable(explain(kSetUpFailed, error), error);
    io_uring_ring_dontfork(&ring_);
    try {
      if (setup.arena) features.registered_buffers = register_arena(setup);
      features.registered_files = has_files_ = io_uring_register_files_sparse(&ring_, kFileSlots) == 0;
      files_.resize(kFileSlots);
    } catch (...) {
      io_uring_queue_exit(&ring_);
      throw;
    }
    arm_wake();
  }

  ~UringRing() override {
    // A fork that lives on holds the ring; it must not hold memory and files with it. A ring that was refused may have
    // reads that nobody hears of any more, and some kernels would wait for them here.
    if (!refusal_) {
      io_uring_unregister_buffers(&ring_);
      io_uring_unregister_files(&ring_);
    }
    io_uring_queue_exit(&ring_);
  }

  double now() override { return monotonic_s(); }

  void submit(const Read& read) override {
    if (refusal_) return;
    auto* file = static_cast<File*>(read.source);
    flying_[read.token] = {file, read.offset, ring_.sq.sqe_tail};
    io_uring_sqe* sqe = entry();
    const int slot = file_slot(file);
    const int fd = slot >= 0 ? slot : file->fd();
    const int buffer = buffer_index(read);
    if (buffer >= 0) {
      io_uring_prep_read_fixed(sqe, fd, read.address, read.length, read.offset, buffer);
    } else {
      io_uring_prep_read(sqe, fd, read.address, read.length, read.offset);
    }
    if (slot >= 0) sqe->flags |= IOSQE_FIXED_FILE;
    if (read.blocking) sqe->flags |= IOSQE_ASYNC;
    io_uring_sqe_set_data64(sqe, read.token);
  }

  void cancel(uint64_t token) override {
    if (refusal_) return;
    io_uring_sqe* sqe = entry();
    io_uring_prep_cancel64(sqe, token, 0);
    io_uring_sqe_set_data64(sqe, kCancelToken);
  }

  size_t complete(Completion* completions, size_t capacity, double wait_s) override {
    const size_t count = reap(completions, capacity);
    if (refusal_) {
      if (count == 0) pause_for(wait_s);
      return count;
    }
    if (count > 0 || woken_) {
      io_uring_submit(&ring_);
      return count;
    }
    __kernel_timespec limit;
    limit.tv_sec = static_cast<int64_t>(wait_s);
    limit.tv_nsec = static_cast<int64_t>((wait_s - std::floor(wait_s)) * 1e9);
    io_uring_cqe* cqe = nullptr;
    const int error = io_uring_submit_and_wait_timeout(&ring_, &cqe, 1, &limit, nullptr);
    switch (error < 0 ? -error : 0) {
      case 0:
      case ETIME:
      case EINTR:
        break;
      case EAGAIN:
      case EBUSY:
      case ENOMEM:
        pause_for(wait_s);
        break;
      default:
        refuse(-error);
    }
    return reap(completions, capacity);
  }

  const Failure* refusal() const override { return refusal_ ? &*refusal_ : nullptr; }

  bool holds(uint64_t token) const override {
    const auto read = flying_.find(token);
    if (read == flying_.end()) return false;
    const unsigned first_left = ring_.sq.sqe_tail - io_uring_sq_ready(&ring_);
    return static_cast<int>(first_left - read->second.position) > 0;  // they wrap around
  }

  void wake() override {
    const uint64_t one = 1;
    // The counter holds until it is read; a write can only fail where a wake-up is waiting already.
    while (write(wake_fd_.get(), &one, sizeof one) < 0 && errno == EINTR) {
    }
  }

 private:
  // A read the kernel was, or is to be, asked for; `position` is its place in the submission queue.
  struct Flying {
    File* file;
    uint64_t offset;
    unsigned position;
  };

  // The kernel takes nothing now: not a whole core for asking.
  static void pause_for(double wait_s) {
    std::this_thread::sleep_for(std::chrono::duration<double>(std::min(wait_s, 0.001)));
  }

  void refuse(int error) {
    refusal_.emplace();
    refusal_->kind = ErrorKind::kUnavailable;
    refusal_->error = error;
    refusal_->message = explain("io_uring takes no more requests: ", error);
  }

  // The submission queue has room for a read and a cancellation a place in the core, and the wake-up.
  io_uring_sqe* entry() {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    while (!sqe) {
      io_uring_submit(&ring_);
      sqe = io_uring_get_sqe(&ring_);
    }
    return sqe;
  }

  void arm_wake() {
    io_uring_sqe* sqe = entry();
    io_uring_prep_read(sqe, wake_fd_.get(), &wake_count_, sizeof wake_count_, 0);
    io_uring_sqe_set_data64(sqe, kWakeToken);
  }

  size_t reap(Completion* completions, size_t capacity) {
    size_t count = 0;
    unsigned head, seen = 0;
    woken_ = false;
    io_uring_cqe* cqe;
    io_uring_for_each_cqe(&ring_, head, cqe) {
      if (count == capacity) break;
      ++seen;
      const uint64_t token = io_uring_cqe_get_data64(cqe);
      if (token == kWakeToken) {
        woken_ = true;
      } else if (token != kCancelToken) {
        completions[count++] = {token, cqe->res};
        const auto read = flying_.find(token);
        if (read == flying_.end()) continue;
        if (cqe->res > 0) read->second.file->was_read(read->second.offset, static_cast<uint64_t>(cqe->res));
        flying_.erase(read);
      }
    }
    io_uring_cq_advance(&ring_, seen);
    if (woken_ && !refusal_) arm_wake();
    return count;
  }

  bool register_arena(const RingSetup& setup) {
    const Arena& arena = *setup.arena;
    if (arena.info().huge_page_share < kLeastHugePageShare) {
      const std::string reason =
          "the arena is in small pages, which cost more to register than it saves (it gets huge ones where memory is "
          "free, after `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`): unregistered reads";
      if (!setup.log->allow(reason, "")) fail_unavailable(reason);
      return false;
    }
    std::vector<iovec> pieces;
    for (uint64_t at = 0; at < arena.nbytes(); at += kRegisteredPieceBytes) {
      pieces.push_back({arena.address() + at, std::min<size_t>(kRegisteredPieceBytes, arena.nbytes() - at)});
    }
    const int error = -io_uring_register_buffers(&ring_, pieces.data(), static_cast<unsigned>(pieces.size()));
    if (error == 0) {
      begin_ = arena.address();
      end_ = begin_ + arena.nbytes();
      return true;
    }
    const std::string reason = explain_buffers(error, arena.nbytes());
    if (!setup.log->allow(reason, "")) fail_unavailable(reason, error);
    return false;
  }

  int buffer_index(const Read& read) const {
    if (read.address < begin_ || read.address + read.length > end_) return -1;
    return static_cast<int>(static_cast<uint64_t>(read.address - begin_) / kRegisteredPieceBytes);
  }

  // The file's place in the ring's table; -1 where it has none. Files that only the table holds are let go.
  int file_slot(File* file) {
    if (!has_files_) return -1;
    auto found = slots_.find(file);
    if (found != slots_.end()) return found->second;
    int free = -1;
    for (int i = 0; i < static_cast<int>(files_.size()); ++i) {
      if (files_[i] && files_[i].use_count() == 1) {
        int none = -1;
        io_uring_register_files_update(&ring_, static_cast<unsigned>(i), &none, 1);
        slots_.erase(files_[i].get());
        files_[i].reset();
      }
      if (!files_[i] && free < 0) free = i;
    }
    int fd = file->fd();
    if (free < 0 || io_uring_register_files_update(&ring_, static_cast<unsigned>(free), &fd, 1) != 1) return -1;
    files_[free] = file->shared_from_this();
    slots_[file] = free;
    return free;
  }

  io_uring ring_;
  Fd wake_fd_;
  uint64_t wake_count_ = 0;
  bool woken_ = false;
  std::optional<Failure> refusal_;
  std::unordered_map<uint64_t, Flying> flying_;
  char* begin_ = nullptr;
  char* end_ = nullptr;
  bool has_files_ = false;
  std::vector<std::shared_ptr<File>> files_;
  std::unordered_map<File*, int> slots_;
};

}  // namespace

std::unique_ptr<WakeableRing> make_uring_ring(const RingSetup& setup, RingFeatures& features) {
  return std::make_unique<UringRing>(setup, features);
}

std::string why_no_uring() {
  io_uring ring;
  std::string detail;
  const int error = set_up(ring, 1, detail);
  if (error != 0) return explain(kSetUpFailed, error);
  // A filter may let a ring be made and not used.
  io_uring_prep_nop(io_uring_get_sqe(&ring));
  const int submitted = io_uring_submit_and_wait(&ring, 1);
  io_uring_queue_exit(&ring);
  return submitted < 0 ? explain("io_uring takes no requests: ", -submitted) : "";
}

}  // namespace mhaffn
