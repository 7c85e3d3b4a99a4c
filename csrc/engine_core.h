// The engine core: which read is next, and what each completion means.
//
// A single-threaded state machine over a Ring. It makes no system call, starts no thread and takes the time
// from the Ring, so that a test can supply faults, order and time, and replay them from a seed.
#pragma once

#include <errno.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "error.h"

namespace mhaffn {

// A file as the core sees it.
class Source {
 public:
  virtual ~Source() = default;
  virtual const std::string& path() const = 0;
  virtual bool direct() const = 0;
  // A short read may be continued at multiples of this many bytes: the device's sector, 1 when buffered.
  virtual uint32_t resume_align() const = 0;
  // Where the file ends now.
  virtual uint64_t size() const = 0;
  // Goes from direct to buffered reads after `error`; false where that is not allowed.
  virtual bool fall_back(int error) = 0;
};

// A run of a file and where it goes. `length` is aligned and may pass the end of the file; `need` is what was
// asked for and must arrive.
struct Piece {
  Source* source = nullptr;
  uint64_t offset = 0;
  char* address = nullptr;
  uint32_t length = 0;
  uint32_t need = 0;
};

// The pieces of one request on one device. The core calls it from its own thread only.
class Job {
 public:
  virtual ~Job() = default;
  virtual const std::vector<Piece>& pieces() const = 0;
  // Cancelled, or failed on this or another device: nothing more of it need be read.
  virtual bool stopped() const = 0;
  virtual void started(double now) = 0;
  // The first `done` bytes of the piece have arrived and will not be written again.
  virtual void progressed(size_t piece, uint32_t done, double now) = 0;
  // Called at most once a piece; stopped() is true afterwards.
  virtual void failed(Failure failure) = 0;
  // A read of it may write to its memory for as long as the process lives: nobody else may ever have that memory.
  virtual void lost() = 0;
  // Nothing of this job is in flight, and nothing will be. The last call.
  virtual void drained(double now) = 0;
};

// `blocking`: an earlier try came back with EAGAIN; the engine should let this one wait.
struct Read {
  uint64_t token = 0;
  Source* source = nullptr;
  uint64_t offset = 0;
  char* address = nullptr;
  uint32_t length = 0;
  bool blocking = false;
};

// `result` is a count of bytes, or a negated errno.
struct Completion {
  uint64_t token = 0;
  int32_t result = 0;
};

class Ring {
 public:
  virtual ~Ring() = default;
  virtual double now() = 0;
  virtual void submit(const Read& read) = 0;
  // Asks for an early end of a read; its completion arrives all the same.
  virtual void cancel(uint64_t token) = 0;
  // Starts what was submitted and waits up to `wait_s` for a completion; returns early, with none, when woken.
  virtual size_t complete(Completion* completions, size_t capacity, double wait_s) = 0;
};

struct CoreLimits {
  unsigned depth = 16;
  // A read that only ever gets transient errors fails after this long.
  double stall_s = 30.0;
};

// Read by other threads while the core runs; up to date with what its jobs were told.
struct CoreCounts {
  std::atomic<uint64_t> bytes_read{0};
  std::atomic<uint64_t> retries{0};
  std::atomic<double> busy_s{0.0};  // with a read in flight
};

class EngineCore {
 public:
  static constexpr double kForever = 3600.0;

  // Whether a ring that takes nothing more still has the read of this token.
  using Holds = std::function<bool(uint64_t token)>;

  EngineCore(Ring& ring, CoreLimits limits, CoreCounts& counts)
      : ring_(&ring), limits_(limits), counts_(counts), flights_(limits.depth) {}

  void add(std::shared_ptr<Job> job) {
    auto entry = std::make_shared<Entry>();
    entry->job = std::move(job);
    entry->end = entry->job->pieces().size();
    queue_.push_back(std::move(entry));
  }

  // Drops what is not in flight of jobs that stopped, and asks for an early end of the rest.
  void drop_stopped() {
    for (Flight& flight : flights_) {
      if (flight.state == State::kFree || !flight.entry->job->stopped()) continue;
      if (flight.state == State::kResting) {
        retire(flight);
      } else if (!flight.cancelling) {
        flight.cancelling = true;
        ring_->cancel(token(flight));
      }
    }
    const auto kept =
        std::stable_partition(queue_.begin(), queue_.end(), [](const auto& entry) { return !entry->job->stopped(); });
    const std::vector<std::shared_ptr<Entry>> stopped(kept, queue_.end());
    queue_.erase(kept, queue_.end());
    for (const auto& entry : stopped) {
      entry->next = entry->end;
      if (entry->active == 0) entry->job->drained(ring_->now());
    }
  }

  // Submits all that can be; returns when the next resting read is due.
  double fill() {
    const double now = ring_->now();
    double due = now + kForever;
    for (Flight& flight : flights_) {
      if (flight.state == State::kResting) {
        if (flight.entry->job->stopped()) {
          retire(flight);
        } else if (flight.due_s <= now) {
          submit(flight);
        } else {
          due = std::min(due, flight.due_s);
        }
      }
      if (flight.state == State::kFree && start_next(flight, now)) submit(flight);
    }
    return due;
  }

  // Waits for completions, at most until `due`, and acts on them; returns early when woken.
  void finish_until(double due) {
    Completion batch[kBatch];
    const size_t count = ring_->complete(batch, kBatch, std::max(0.0, due - ring_->now()));
    for (size_t i = 0; i < count; ++i) finish(batch[i]);
  }

  // The ring takes nothing more, because of `error`, and may never tell how its reads ended. Jobs of reads that it
  // `holds` fail, and their memory is lost; all others go on with `next`, or fail too where that is none.
  void leave_ring(int error, const std::string& reason, const Holds& holds, Ring* next) {
    const double now = ring_->now();
    for (Flight& flight : flights_) {
      if (flight.state == State::kFree) continue;
      Job& job = *flight.entry->job;
      const bool held = flight.state == State::kFlying && holds(token(flight));
      if (flight.state == State::kFlying) landed(flight, now);
      if ((held || !next) && !job.stopped()) {
        job.failed(failure_of(job.pieces()[flight.piece], flight.done, ErrorKind::kRead, error, reason));
      }
      if (held) job.lost();
      if (job.stopped()) {
        retire(flight);
      } else {
        ++flight.generation;  // what the old ring may still say of it is said of nobody
        ++counts_.retries;
        flight.due_s = now;
      }
    }
    if (next) {
      ring_ = next;
      return;
    }
    for (const auto& entry : std::exchange(queue_, {})) {
      Job& job = *entry->job;
      if (!job.stopped() && entry->next < entry->end) {
        job.failed(failure_of(job.pieces()[entry->next], 0, ErrorKind::kRead, error, reason));
      }
      job.drained(now);
    }
  }

  // After fill(): another job could be started at once. While false, some completion or due time is certain to come.
  bool hungry() const { return queue_.empty() && active_ < flights_.size(); }
  bool idle() const { return active_ == 0 && queue_.empty(); }
  // Reads the ring has not completed: while there are any, their memory must stay.
  unsigned in_flight() const { return flying_; }
  bool any_in_flight(const Holds& holds) const {
    return std::any_of(flights_.begin(), flights_.end(),
                       [&](const Flight& flight) { return flight.state == State::kFlying && holds(token(flight)); });
  }

 private:
  static constexpr size_t kBatch = 64;
  static constexpr unsigned kRepeatsAtEnd = 3;
  static constexpr double kShortestRestS = 50e-6;
  static constexpr double kLongestRestS = 20e-3;
  static constexpr uint32_t kShortestTry = 64 << 10;

  // A job being worked on; pieces before `next` were started, `active` of them are not over.
  struct Entry {
    std::shared_ptr<Job> job;
    size_t next = 0;
    size_t end = 0;
    size_t active = 0;
  };

  enum class State : uint8_t { kFree, kFlying, kResting };

  // A place in the ring: one piece on its way, perhaps over several reads.
  struct Flight {
    State state = State::kFree;
    bool cancelling = false;
    bool blocking = false;
    bool direct = false;
    uint32_t generation = 0;
    uint32_t done = 0;
    uint32_t asked = 0;
    uint32_t limit = 0;
    unsigned repeats = 0;
    double due_s = 0.0;
    double rest_s = kShortestRestS;
    double progress_s = 0.0;
    size_t piece = 0;
    std::shared_ptr<Entry> entry;
  };

  uint64_t token(const Flight& flight) const {
    return (static_cast<uint64_t>(flight.generation) << 32) | static_cast<uint64_t>(&flight - flights_.data());
  }

  bool start_next(Flight& flight, double now) {
    while (!queue_.empty()) {
      std::shared_ptr<Entry> entry = queue_.front();
      Job& job = *entry->job;
      if (job.stopped() || entry->next == entry->end) {
        queue_.pop_front();
        entry->next = entry->end;
        if (entry->active == 0) job.drained(now);
        continue;
      }
      if (entry->next == 0) job.started(now);
      const uint32_t generation = flight.generation + 1;
      flight = Flight{};
      flight.generation = generation;
      flight.piece = entry->next++;
      flight.progress_s = now;
      flight.limit = job.pieces()[flight.piece].length;
      flight.state = State::kResting;
      ++entry->active;
      ++active_;
      if (entry->next == entry->end) queue_.pop_front();
      flight.entry = std::move(entry);
      return true;
    }
    return false;
  }

  void submit(Flight& flight) {
    const Piece& piece = flight.entry->job->pieces()[flight.piece];
    flight.asked = std::min(piece.length - flight.done, flight.limit);
    flight.direct = piece.source->direct();
    flight.state = State::kFlying;
    if (flying_++ == 0) counted_until_s_ = ring_->now();
    ring_->submit({token(flight), piece.source, piece.offset + flight.done, piece.address + flight.done, flight.asked,
                   flight.blocking});
  }

  void finish(const Completion& completion) {
    const size_t index = completion.token & 0xffffffffu;
    if (index >= flights_.size()) return;
    Flight& flight = flights_[index];
    if (flight.state != State::kFlying || token(flight) != completion.token) return;
    const double now = ring_->now();
    landed(flight, now);
    if (flight.entry->job->stopped()) return retire(flight);
    if (completion.result > 0) return advance(flight, static_cast<uint32_t>(completion.result), now);
    if (completion.result == 0) return truncated(flight, flight.done);
    failed(flight, -completion.result, now);
  }

  void landed(Flight& flight, double now) {
    --flying_;
    counts_.busy_s = counts_.busy_s + (now - counted_until_s_);
    counted_until_s_ = now;
    flight.state = State::kResting;
  }

  void advance(Flight& flight, uint32_t count, double now) {
    Job& job = *flight.entry->job;
    const Piece& piece = job.pieces()[flight.piece];
    if (count > flight.asked) {
      return fail(flight, ErrorKind::kRead, EIO, "more bytes arrived than were asked for");
    }
    const uint32_t reached = flight.done + count;
    if (reached >= piece.need) {
      counts_.bytes_read += piece.need - flight.done;
      job.progressed(flight.piece, piece.need, now);
      return retire(flight);
    }
    // Direct reads continue at a sector; what lies beyond the last whole one is read again.
    const uint32_t whole = reached - reached % piece.source->resume_align();
    if (whole > flight.done) {
      counts_.bytes_read += whole - flight.done;
      flight.done = whole;
      flight.repeats = 0;
      flight.rest_s = kShortestRestS;
      flight.limit = piece.length;
      flight.progress_s = now;
      job.progressed(flight.piece, whole, now);
    } else if (++flight.repeats == kRepeatsAtEnd) {
      return truncated(flight, reached);  // part of a sector, again and again: the file ends in it
    }
    ++counts_.retries;
    submit(flight);
  }

  void failed(Flight& flight, int error, double now) {
    Source& source = *flight.entry->job->pieces()[flight.piece].source;
    switch (error) {
      case EINTR:
        if (stalled(flight, now)) break;
        ++counts_.retries;
        return submit(flight);
      case EAGAIN:
      case EBUSY:
      case ENOMEM:
      case ECANCELED:
        if (stalled(flight, now)) break;
        return rest(flight, now);
      case EINVAL:
      case EOPNOTSUPP:
        // Another read of the same file may have made it buffered while this one was in flight.
        if (flight.direct && (!source.direct() || source.fall_back(error))) {
          ++counts_.retries;
          return submit(flight);
        }
        break;
      default:
        break;
    }
    fail(flight, ErrorKind::kRead, error, "");
  }

  bool stalled(const Flight& flight, double now) const { return now - flight.progress_s > limits_.stall_s; }

  // Tries again later, with less: a large read may be refused as a whole where a part of it is not.
  void rest(Flight& flight, double now) {
    ++counts_.retries;
    flight.due_s = now + flight.rest_s;
    flight.rest_s = std::min(2 * flight.rest_s, kLongestRestS);
    if (flight.blocking) flight.limit = std::max(std::min(flight.limit, kShortestTry), flight.limit / 2 / 4096 * 4096);
    flight.blocking = true;
  }

  void truncated(Flight& flight, uint32_t reached) {
    flight.done = reached;
    fail(flight, ErrorKind::kTruncated, 0, "");
  }

  void fail(Flight& flight, ErrorKind kind, int error, const std::string& detail) {
    Job& job = *flight.entry->job;
    job.failed(failure_of(job.pieces()[flight.piece], flight.done, kind, error, detail));
    retire(flight);
  }

  static Failure failure_of(const Piece& piece, uint32_t done, ErrorKind kind, int error, const std::string& detail) {
    Failure failure;
    failure.kind = kind;
    failure.path = piece.source->path();
    failure.offset = piece.offset + done;
    failure.length = piece.need - done;
    failure.error = error;
    const std::string wanted = std::to_string(failure.length) + " bytes at " + std::to_string(failure.offset);
    if (kind == ErrorKind::kTruncated) {
      // A read that starts past the end of the file says only that it ended before.
      const uint64_t end = std::min(failure.offset, piece.source->size());
      failure.length += failure.offset - end;
      failure.offset = end;
      failure.message = failure.path + ": the file ends at byte " + std::to_string(failure.offset) + ", expected " +
                        std::to_string(failure.length) + " more there; it was truncated: fetch or pack it again";
    } else {
      failure.message = failure.path + ": reading " + wanted + " failed: " + errno_text(error) +
                        (detail.empty() ? "" : " (" + detail + ")");
    }
    return failure;
  }

  void retire(Flight& flight) {
    std::shared_ptr<Entry> entry = std::move(flight.entry);
    flight.entry.reset();
    flight.state = State::kFree;
    --active_;
    --entry->active;
    if (entry->active > 0) return;
    if (entry->next < entry->end) {
      if (!entry->job->stopped()) return;
      queue_.erase(std::remove(queue_.begin(), queue_.end(), entry), queue_.end());
      entry->next = entry->end;
    }
    entry->job->drained(ring_->now());
  }

  Ring* ring_;
  const CoreLimits limits_;
  CoreCounts& counts_;
  std::vector<Flight> flights_;
  std::deque<std::shared_ptr<Entry>> queue_;
  unsigned active_ = 0;
  unsigned flying_ = 0;
  double counted_until_s_ = 0.0;
};

}  // namespace mhaffn
