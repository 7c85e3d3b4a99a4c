// The engine core against a ring whose faults, order and time come from a seed.
//
//   core_test [schedules [first seed]]     a failing seed is printed
//   core_test --replay SEED                the same schedule again, step by step
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "check.h"
#include "engine_core.h"

using namespace mhaffn;

namespace {

uint64_t current_seed = 0;
bool verbose = false;
constexpr double kStallS = 2.0;
constexpr uint32_t kShortestTry = 64 << 10;  // a read that was refused is not asked for in less than this
constexpr double kShortestRestS = 50e-6, kLongestRestS = 20e-3;  // before it is asked for again
constexpr double kStepS = 2e-3;                                  // more than the ring's time goes on at once
std::map<std::string, uint64_t> tally;                           // of jobs, by how they ended

// Errors that a read is tried again after.
bool passes(int error) {
  return error == EAGAIN || error == EBUSY || error == ENOMEM || error == EINTR || error == ECANCELED;
}

// A file whose bytes are a function of their offset.
class FakeFile : public Source {
 public:
  FakeFile(int number, uint64_t bytes, uint32_t sector, bool direct, bool may_fall_back)
      : path_("file" + std::to_string(number)),
        number_(number),
        bytes_(bytes),
        sector_(sector),
        direct_(direct),
        may_fall_back_(may_fall_back) {}

  const std::string& path() const override { return path_; }
  bool direct() const override { return direct_; }
  uint32_t resume_align() const override { return direct_ ? sector_ : 1; }
  uint64_t size() const override { return bytes_; }
  bool fall_back(int) override {
    CHECK(direct_);
    if (may_fall_back_) direct_ = false;
    return may_fall_back_;
  }

  bool may_fall_back() const { return may_fall_back_; }
  uint32_t sector() const { return sector_; }
  void truncate(uint64_t bytes) { bytes_ = std::min(bytes_, bytes); }
  char at(uint64_t offset) const {
    const uint64_t mixed =
        (offset + 1) * 0x9E3779B97F4A7C15ull + static_cast<uint64_t>(number_) * 0xD1B54A32D192ED03ull;
    return static_cast<char>(mixed >> 56);
  }

 private:
  std::string path_;
  int number_;
  uint64_t bytes_;
  uint32_t sector_;
  bool direct_;
  bool may_fall_back_;
};

struct Odds {  // of 1000 completions
  int partial, refused, interrupted, io_error, gone, invalid, canceled, splinter, excess, stray;
};

class FakeJob : public Job {
 public:
  static constexpr char kPoison = static_cast<char>(0xA5);

  std::vector<Piece> list;
  std::vector<uint32_t> done;
  std::vector<char> memory;
  std::vector<Failure> failures;
  std::set<int> injected;       // errors that it cannot recover from
  std::vector<double> moved_s;  // when each piece was begun or last got on
  std::vector<int> refusals;    // of each piece, since then
  std::vector<double> refused_s;
  bool is_lost = false;
  const double* clock = nullptr;
  bool stop = false;
  int starts = 0;
  int drains = 0;

  const std::vector<Piece>& pieces() const override { return list; }
  bool stopped() const override { return stop; }
  void started(double) override { CHECK(++starts == 1); }
  void progressed(size_t piece, uint32_t count, double) override {
    CHECK(drains == 0);
    CHECK(count > done[piece] && count <= list[piece].need);
    const auto* file = static_cast<FakeFile*>(list[piece].source);
    for (uint32_t i = done[piece]; i < count; ++i) CHECK(list[piece].address[i] == file->at(list[piece].offset + i));
    done[piece] = count;
    refusals[piece] = 0;
    moved_s[piece] = *clock;
  }
  void failed(Failure failure) override {
    CHECK(drains == 0);
    bool explained = injected.count(failure.error) > 0;
    for (size_t i = 0; i < list.size(); ++i) {
      const Piece& piece = list[i];
      if (piece.source->path() != failure.path) continue;
      const uint64_t end = piece.source->size();
      if (failure.kind == ErrorKind::kTruncated) {
        explained |= failure.offset == end && end < piece.offset + piece.need;
      } else if (passes(failure.error) && failure.offset == piece.offset + done[i]) {
        explained |= moved_s[i] > 0 && *clock - moved_s[i] > kStallS;
      }
    }
    CHECK(explained);
    failures.push_back(std::move(failure));
    stop = true;
  }
  void lost() override {
    CHECK(drains == 0 && stop);
    is_lost = true;
  }
  void drained(double) override { CHECK(++drains == 1); }
};

class FakeRing : public Ring {
 public:
  FakeRing(std::mt19937_64& random, unsigned depth, Odds odds) : random_(random), depth_(depth), odds_(odds) {}

  static constexpr double kStart = 1.0;

  std::vector<std::shared_ptr<FakeJob>> jobs;
  uint64_t submissions = 0;

  double now() override { return now_; }
  const double* clock() const { return &now_; }

  // The kernel takes nothing more, and keeps some of what it has. Whose reads those are learns of it as `error`; all
  // do where there is nothing to go on with.
  void refuse(int error, bool last) {
    for (const Read& read : flying_) {
      if (chance(500)) held_.push_back(read);
    }
    for (const Read& read : held_) owner(read).first->injected.insert(error);
    for (const auto& job : jobs) {
      if (last) job->injected.insert(error);
    }
  }
  bool holds(uint64_t token) const {
    return std::any_of(held_.begin(), held_.end(), [&](const Read& read) { return read.token == token; });
  }
  void check_lost() {
    for (const Read& read : held_) CHECK(owner(read).first->is_lost);
    for (const auto& job : jobs) CHECK(!job->is_lost || !job->failures.empty() || job->stop);
  }
  // Takes this ring for another: nothing is in flight, but what is held may be written to at any time.
  void begin_again() {
    for (const Read& read : flying_) left_.push_back(read.token);
    flying_.clear();
    cancelled_.clear();
  }

  void submit(const Read& read) override {
    CHECK(flying_.size() < depth_);
    CHECK(read.length > 0);
    auto* file = static_cast<FakeFile*>(read.source);
    if (file->direct()) CHECK(read.offset % file->sector() == 0 && read.length % file->sector() == 0);
    const auto [job, piece] = owner(read);
    const uint32_t at = static_cast<uint32_t>(read.address - job->list[piece].address);
    CHECK(job->drains == 0);
    CHECK(at >= job->done[piece]);  // what was reported ready is never written again
    CHECK(at + read.length <= job->list[piece].length);
    for (const auto* others : {&flying_, &held_}) {
      for (const Read& other : *others) {
        CHECK(other.token != read.token);
        CHECK(read.address + read.length <= other.address || other.address + other.length <= read.address);
      }
    }
    // All that is left, but for what was refused as a whole: that is tried in halves, until it gets on again.
    const uint32_t left = job->list[piece].length - at;
    if (job->refusals[piece] == 0) CHECK(read.length == left);
    if (job->refusals[piece] > 1) CHECK(read.length <= std::max(kShortestTry, job->list[piece].length / 2));
    CHECK(read.length >= std::min(left, kShortestTry));
    // After a rest that is short at first, and never long.
    if (double& refused_s = job->refused_s[piece]; refused_s > 0) {
      CHECK(now_ - refused_s < (job->refusals[piece] == 1 ? kShortestRestS : kLongestRestS) + kStepS);
      refused_s = 0;
    }
    for (uint64_t token : left_) CHECK(token != read.token);
    ++submissions;
    if (job->moved_s[piece] == 0) job->moved_s[piece] = now_;
    flying_.push_back(read);
    direct_at_submit_[read.token] = file->direct();
    if (verbose)
      std::printf("%.6f submit %s %llu+%u\n", now_, file->path().c_str(), (unsigned long long)read.offset, read.length);
  }

  void cancel(uint64_t token) override {
    CHECK(std::find(cancelled_.begin(), cancelled_.end(), token) == cancelled_.end());
    for (const Read& read : flying_) {
      if (read.token == token) return cancelled_.push_back(token);
    }
    CHECK(!"a read was cancelled that is not in flight");
  }

  size_t complete(Completion* completions, size_t capacity, double wait_s) override {
    CHECK(wait_s >= 0);
    for (const Read& read : held_) memset(read.address, 0x3C, read.length);
    if (flying_.empty()) {
      now_ += std::min(wait_s, 0.05);
      return 0;
    }
    now_ += chance(20) ? 1e-3 : 1e-5;
    if (chance(50)) return 0;  // woken
    size_t first = 0;
    if (chance(odds_.stray)) completions[first++] = stray();
    const size_t count = first + 1 + random_() % std::min(capacity - first, flying_.size());
    for (size_t i = first; i < count; ++i) {
      const size_t pick = random_() % flying_.size();
      const Read read = flying_[pick];
      flying_.erase(flying_.begin() + static_cast<std::ptrdiff_t>(pick));
      over_.push_back(read.token);
      completions[i] = {read.token, outcome(read)};
      if (passes(-completions[i].result) && completions[i].result != -EINTR) {
        const auto [job, piece] = owner(read);
        ++job->refusals[piece];
        job->refused_s[piece] = now_;
      }
      if (verbose)
        std::printf("%.6f complete %llu+%u: %d\n", now_, (unsigned long long)read.offset, read.length,
                    completions[i].result);
    }
    return count;
  }

  bool chance(int per_mille) { return static_cast<int>(random_() % 1000) < per_mille; }

 private:
  std::pair<FakeJob*, size_t> owner(const Read& read) {
    for (const auto& job : jobs) {
      for (size_t i = 0; i < job->list.size(); ++i) {
        const Piece& piece = job->list[i];
        if (read.address >= piece.address && read.address < piece.address + piece.length) return {job.get(), i};
      }
    }
    CHECK(!"a read goes to memory of no job");
    std::abort();
  }

  // A completion of no read in flight: of one that is over, or of none at all.
  Completion stray() {
    uint64_t token = random_();
    if (!over_.empty() && !chance(100))
      token = over_[over_.size() - 1 - random_() % std::min<size_t>(over_.size(), 12)];
    for (const Read& read : flying_) {
      if (read.token == token) token = ~token;
    }
    const int32_t results[] = {0, 1, 512, 4096, -EIO, -EINVAL, -EAGAIN};
    return {token, results[random_() % std::size(results)]};
  }

  int32_t outcome(const Read& read) {
    auto* file = static_cast<FakeFile*>(read.source);
    FakeJob& job = *owner(read).first;
    if (std::find(cancelled_.begin(), cancelled_.end(), read.token) != cancelled_.end() && chance(500))
      return -ECANCELED;
    if (chance(odds_.refused)) return -(chance(800) ? EAGAIN : chance(500) ? EBUSY : ENOMEM);
    if (chance(odds_.interrupted)) return -EINTR;
    if (chance(odds_.canceled)) return -ECANCELED;
    if (chance(odds_.io_error)) return lasting(job, EIO);
    if (chance(odds_.gone)) return lasting(job, ENODEV);
    if (direct_at_submit_[read.token] && chance(odds_.invalid)) {
      return file->may_fall_back() ? -EINVAL : lasting(job, EINVAL);
    }
    if (chance(odds_.excess)) {
      lasting(job, EIO);
      return static_cast<int32_t>(read.length + 1 + random_() % 5000);  // of which nothing arrived
    }
    if (read.offset >= file->size()) return 0;
    uint32_t count = static_cast<uint32_t>(std::min<uint64_t>(read.length, file->size() - read.offset));
    if (chance(odds_.partial)) {
      const uint32_t step = direct_at_submit_[read.token] ? file->sector() : 1;
      if (count > step) count = std::max(step, static_cast<uint32_t>(random_() % count) / step * step);
    }
    // Less than a sector where there is more: once or twice, since a third time means that the file ends there.
    unsigned& splinters = splinters_[{&job, read.address}];
    const bool whole = direct_at_submit_[read.token] && count >= file->sector();
    if (whole && splinters < 2 && chance(odds_.splinter)) {
      ++splinters;
      count = 1 + static_cast<uint32_t>(random_() % (file->sector() - 1));
    }
    for (uint32_t i = 0; i < count; ++i) read.address[i] = file->at(read.offset + i);
    return static_cast<int32_t>(count);
  }

  static int32_t lasting(FakeJob& job, int error) {
    job.injected.insert(error);
    return -error;
  }

  std::mt19937_64& random_;
  const unsigned depth_;
  const Odds odds_;
  double now_ = kStart;
  std::vector<Read> flying_;
  std::vector<Read> held_;
  std::vector<uint64_t> left_;  // reads that were in flight when it took nothing more
  std::vector<uint64_t> cancelled_;
  std::vector<uint64_t> over_;
  std::map<std::pair<const FakeJob*, const char*>, unsigned> splinters_;  // by where the read goes
  std::map<uint64_t, bool> direct_at_submit_;
};

Odds draw_odds(std::mt19937_64& random) {
  auto rarely = [&](int most) { return random() % 3 ? 0 : static_cast<int>(random() % most); };
  if (random() % 100 == 0) return {0, 1000, 0, 0, 0, 0, 0, 0, 0, 0};     // refused for ever
  if (random() % 100 == 0) return {900, 980, 0, 0, 0, 0, 0, 0, 0, 100};  // and nearly so
  return {rarely(900), rarely(700), rarely(700), rarely(60), rarely(30),
          rarely(200), rarely(100), rarely(600), rarely(30), rarely(300)};
}

std::shared_ptr<FakeJob> draw_job(std::mt19937_64& random, std::vector<std::unique_ptr<FakeFile>>& files,
                                  const double* clock, bool large) {
  constexpr uint32_t kSector = 512;
  const uint32_t most = large ? 600 : 8;  // sectors a piece
  auto job = std::make_shared<FakeJob>();
  const size_t count = random() % 6;
  std::vector<uint32_t> lengths(count);
  size_t total = kSector;
  for (uint32_t& length : lengths) total += (length = kSector * static_cast<uint32_t>(1 + random() % most)) + kSector;
  job->memory.assign(total, FakeJob::kPoison);
  job->done.assign(count, 0);
  job->moved_s.assign(count, 0.0);
  job->refusals.assign(count, 0);
  job->refused_s.assign(count, 0.0);
  job->clock = clock;
  char* place = job->memory.data() + kSector;  // between pieces lies memory that nothing may write to
  for (uint32_t length : lengths) {
    auto* file = files[random() % files.size()].get();
    const uint32_t need = random() % 2 ? length : 1 + static_cast<uint32_t>(random() % length);
    uint64_t offset = random() % 20 * kSector;
    if (random() % 4 && offset + need > file->size()) offset = file->size() / 2 / kSector * kSector;
    job->list.push_back({file, offset, place, length, need});
    place += length + kSector;
  }
  return job;
}

void check_job(const FakeJob& job, bool cancelled) {
  CHECK(job.drains == 1);
  for (const Failure& failure : job.failures) CHECK(!failure.path.empty() && !failure.message.empty());
  CHECK(job.failures.size() <= 1);
  bool complete = true;
  for (size_t i = 0; i < job.list.size(); ++i) complete = complete && job.done[i] == job.list[i].need;
  CHECK(complete || cancelled || !job.failures.empty());
  // Outside the pieces nothing was written.
  std::vector<bool> inside(job.memory.size());
  for (const Piece& piece : job.list) {
    const auto at = piece.address - job.memory.data();
    std::fill(inside.begin() + at, inside.begin() + at + piece.length, true);
  }
  for (size_t i = 0; i < job.memory.size(); ++i) CHECK(inside[i] || job.memory[i] == FakeJob::kPoison);
}

void run_schedule(uint64_t seed) {
  current_seed = seed;
  std::mt19937_64 random(seed);
  const unsigned depth = 1 + static_cast<unsigned>(random() % 6);
  std::vector<std::unique_ptr<FakeFile>> files;
  const bool large = random() % 200 == 0;  // large enough to be tried in parts
  for (int i = 0; i < 2; ++i) {
    const uint32_t sector = random() % 2 ? 512 : 256;
    const uint64_t bytes = random() % (large ? 1 << 20 : 24000);
    files.push_back(std::make_unique<FakeFile>(i, bytes, sector, random() % 4 != 0, random() % 3 != 0));
  }
  const Odds odds = draw_odds(random);
  FakeRing ring(random, depth, odds);
  CoreCounts counts;
  EngineCore core(ring, {depth, kStallS}, counts);
  std::set<const FakeJob*> cancelled;
  size_t waiting = random() % 5;
  const int refused_at = random() % 8 ? -1 : static_cast<int>(random() % 40);
  for (int turn = 0; waiting > 0 || !core.idle(); ++turn) {
    CHECK(turn < 200000);
    if (waiting > 0 && random() % 3 == 0) {
      --waiting;
      auto job = draw_job(random, files, ring.clock(), large);
      ring.jobs.push_back(job);
      core.add(job);
    }
    if (random() % 64 == 0 && !ring.jobs.empty()) {
      FakeJob* job = ring.jobs[random() % ring.jobs.size()].get();
      if (job->drains == 0) {
        job->stop = true;
        cancelled.insert(job);
        core.drop_stopped();
      }
    }
    if (turn == refused_at) {
      const int error = random() % 2 ? EPERM : ENOSYS;
      const bool last = random() % 4 == 0;
      const auto holds = [&](uint64_t token) { return ring.holds(token); };
      ring.refuse(error, last);
      core.leave_ring(error, "refused", holds, last ? nullptr : &ring);
      ring.check_lost();
      CHECK(!core.any_in_flight(holds) && core.in_flight() == 0);
      ring.begin_again();
      if (last) {
        CHECK(core.idle());
        break;
      }
    }
    if (random() % 2000 == 0) files[random() % files.size()]->truncate(random() % 12000);
    const double due = core.fill();
    CHECK(core.hungry() || core.in_flight() > 0 || due < ring.now() + EngineCore::kForever / 2);
    core.finish_until(waiting > 0 ? ring.now() : due);
    CHECK(core.in_flight() <= depth);
  }
  uint64_t arrived = 0, pieces = 0;
  for (const auto& job : ring.jobs) {
    pieces += job->list.size();
    for (uint32_t bytes : job->done) arrived += bytes;
  }
  CHECK(counts.bytes_read == arrived);
  CHECK(counts.busy_s <= ring.now() - FakeRing::kStart && (counts.busy_s > 0 || ring.submissions == 0));
  // With rests of up to 20 ms, not as fast as it can.
  if (odds.refused == 1000) CHECK(ring.submissions <= pieces * (static_cast<uint64_t>(kStallS / 20e-3) + 20));
  for (const auto& job : ring.jobs) {
    check_job(*job, cancelled.count(job.get()) > 0);
    if (!job->failures.empty()) {
      ++tally[job->failures[0].kind == ErrorKind::kTruncated ? "truncated" : errno_text(job->failures[0].error)];
    } else {
      ++tally[cancelled.count(job.get()) ? "cancelled" : "complete"];
    }
  }
}

extern "C" void print_seed(int) {
  char text[128];
  const int length = snprintf(text, sizeof text, "failing seed: replay with core_test --replay %llu\n",
                              static_cast<unsigned long long>(current_seed));
  if (write(2, text, static_cast<size_t>(length)) < 0) _exit(2);
}

}  // namespace

int main(int argc, char** argv) {
  signal(SIGABRT, print_seed);
  signal(SIGSEGV, print_seed);
  if (argc > 2 && strcmp(argv[1], "--replay") == 0) {
    verbose = true;
    run_schedule(std::stoull(argv[2]));
    return 0;
  }
  const uint64_t count = argc > 1 ? std::stoull(argv[1]) : 100000;
  const uint64_t first = argc > 2 ? std::stoull(argv[2]) : 1;
  const auto start = std::chrono::steady_clock::now();
  for (uint64_t seed = first; seed < first + count; ++seed) run_schedule(seed);
  const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  for (const auto& [how, jobs] : tally) std::printf("  %8llu jobs %s\n", (unsigned long long)jobs, how.c_str());
  for (const char* how : {"complete", "truncated", "cancelled"}) CHECK(count < 1000 || tally[how] > count / 100);
  std::printf("core_test: %llu schedules, bytes exact or a typed error in each (%.1f s)\n",
              static_cast<unsigned long long>(count), took);
  return 0;
}
