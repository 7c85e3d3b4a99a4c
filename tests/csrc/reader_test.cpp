// Both engines without Python: many submitters, cancellation, close with reads in flight, memory that cannot be
// drained. Built plain, with AddressSanitizer and with ThreadSanitizer.
//
//   reader_test FOLDER [rounds]
#include "reader.h"

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "numa.h"

using namespace mhaffn;
namespace fs = std::filesystem;

namespace {

constexpr size_t kFileBytes = (24 << 20) + 1234;
constexpr size_t kSubmitters = 8;
std::string path;

char byte_at(uint64_t offset) { return static_cast<char>(((offset + 1) * 0x9E3779B97F4A7C15ull) >> 56); }

void make_file() {
  std::vector<char> content(kFileBytes);
  for (size_t i = 0; i < kFileBytes; ++i) content[i] = byte_at(i);
  const int fd = open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
  CHECK(fd >= 0 && write(fd, content.data(), kFileBytes) == static_cast<ssize_t>(kFileBytes) && fsync(fd) == 0);
  close(fd);
}

std::shared_ptr<Arena> make_arena(size_t nbytes, bool prefault = true) {
  ArenaOptions options;
  options.nbytes = nbytes;
  options.cuda = UseCuda::kNo;
  options.prefault = prefault;
  return Arena::create(options);
}

ReaderOptions options_of(EngineKind engine) {
  ReaderOptions options;
  options.engine = engine;
  options.block_bytes = 256 << 10;
  return options;
}

void nothing() {}

// Waits; true when all bytes arrived, false when it was cancelled.
bool outcome(Request& request) {
  try {
    request.wait(30.0, nothing);
    return true;
  } catch (const Error& error) {
    CHECK(error.failure().kind == ErrorKind::kCancelled);
    return false;
  }
}

void check_bytes(const Request& request, const Lease& lease, const std::vector<Extent>& extents) {
  for (size_t i = 0; i < extents.size(); ++i) {
    const char* bytes = lease.address() + request.slot_offset() + request.layout().placements[i];
    for (uint64_t j = 0; j < extents[i].length; ++j) CHECK(bytes[j] == byte_at(extents[i].offset + j));
  }
}

void submit_many(Reader& reader, Arena& arena, uint64_t seed, int rounds, std::atomic<int>& cancelled) {
  std::mt19937_64 random(seed);
  for (int round = 0; round < rounds; ++round) {
    std::vector<Extent> extents(1 + random() % 4);
    for (Extent& extent : extents) {
      extent = {path, random() % kFileBytes, 0};
      extent.length = random() % std::min<uint64_t>(1 << 19, kFileBytes - extent.offset + 1);
    }
    const auto lease = arena.lease(lay_out(extents).cover_bytes + kPageBytes, std::nullopt);
    const auto request = reader.submit(extents, lease, 0);
    if (random() % 4 == 0) request->cancel();
    if (random() % 4 == 0) {
      try {
        request->wait_ready(random() % (1 << 19), 30.0, nothing);
      } catch (const Error& error) {
        CHECK(error.failure().kind == ErrorKind::kCancelled);
      }
    }
    if (outcome(*request)) {
      check_bytes(*request, *lease, extents);
    } else {
      ++cancelled;
    }
  }
}

void test_many_submitters(EngineKind engine, int rounds) {
  auto arena = make_arena(kSubmitters * (6 << 20));
  Reader reader(options_of(engine), arena);
  std::atomic<int> cancelled{0};
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kSubmitters; ++i) {
    threads.emplace_back([&, i] { submit_many(reader, *arena, i, rounds, cancelled); });
  }
  std::thread watcher([&] {
    for (int i = 0; i < rounds; ++i) {
      CHECK(reader.info().leaked_bytes == 0 && arena->info().nbytes == arena->nbytes());
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  for (std::thread& thread : threads) thread.join();
  watcher.join();
  CHECK(cancelled > 0);
  CHECK(reader.close() == 0);
  CHECK(arena->info().leased_bytes == 0);
}

// After close() nothing writes to the slots, whether it is called or left to the destructor.
void test_close_in_flight(EngineKind engine, bool call_close) {
  constexpr size_t kRequests = 6;
  constexpr size_t kLength = 4 << 20;
  auto arena = make_arena(kRequests * kLength);
  auto reader = std::make_unique<Reader>(options_of(engine), arena);
  std::vector<std::shared_ptr<Request>> requests;
  for (size_t i = 0; i < kRequests; ++i) {
    requests.push_back(reader->submit({{path, i * kLength, kLength}}, arena->lease(kLength, i * kLength), 0));
  }
  requests[0]->wait_ready(1, 30.0, nothing);
  const auto start = std::chrono::steady_clock::now();
  if (call_close) CHECK(reader->close() == 0);
  reader.reset();
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(5));
  CHECK(arena->info().leased_bytes == 0);
  memset(arena->address(), 0x5A, arena->nbytes());
  for (const auto& request : requests) {
    CHECK(request->done());
    outcome(*request);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  for (size_t i = 0; i < arena->nbytes(); ++i) CHECK(arena->address()[i] == 0x5A);
}

class Log : public FallbackLog {
 public:
  explicit Log(bool allows) : allows_(allows) {}
  bool allow(const std::string& reason, const std::string&) override {
    reasons.push_back(reason);
    return allows_;
  }
  std::vector<std::string> reasons;

 private:
  const bool allows_;
};

// A sysfs with these contents, and no others.
class FakeSysfs {
 public:
  FakeSysfs(const char* has_memory, const char* numa_node) : root_(fs::temp_directory_path() / "mhaffn-sysfs-XXXXXX") {
    std::string name = root_.string();
    CHECK(mkdtemp(name.data()));
    root_ = name;
    if (has_memory) put("devices/system/node/has_memory", has_memory);
    if (numa_node) put(std::string("bus/pci/devices/") + kGpu + "/numa_node", numa_node);
  }
  ~FakeSysfs() { fs::remove_all(root_); }

  static constexpr const char* kGpu = "0000:3b:00.0";
  int node_of(const char* address) const { return near_node(root_.string(), address); }

 private:
  void put(const fs::path& path, const char* content) const {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << content;
  }
  fs::path root_;
};

void test_memory_is_near_the_gpu_where_there_is_a_choice() {
  const struct {
    const char *has_memory, *numa_node;
    int expected;
  } machines[] = {
      {"0-1\n", "1\n", 1},      {"0-1\n", "0\n", 0},         {"0,2-3\n", "3\n", 3},   // two or three nodes
      {"0\n", "0\n", -1},       {nullptr, nullptr, -1},      {"0-1\n", nullptr, -1},  // no choice; no NUMA; no such GPU
      {"0-1\n", "-1\n", -1},    {"0-1\n", "5\n", -1},        {"0,2\n", "1\n", -1},  // not known; a node without memory
      {"rubbish\n", "1\n", -1}, {"0-rubbish\n", "1\n", -1},  {"1-0\n", "1\n", -1},  // garbage
      {"0-1x\n", "1\n", -1},    {"0-99999999\n", "1\n", -1}, {"", "", -1},           {"0-1\n", "rubbish\n", -1},
      {"0--1\n", "1\n", -1},    {"-1,0-1\n", "1\n", -1},
  };
  for (const auto& machine : machines) {
    const FakeSysfs sysfs(machine.has_memory, machine.numa_node);
    CHECK(sysfs.node_of(FakeSysfs::kGpu) == machine.expected);
    CHECK(sysfs.node_of("0000:00:00.0") == -1 && sysfs.node_of("") == -1);
  }
}

void test_a_node_asked_for_is_used_or_refused() {
  ArenaOptions options;
  options.nbytes = 2 << 20;
  options.cuda = UseCuda::kNo;
  options.numa_node = 0;
  if (fs::exists("/sys/devices/system/node/node0")) CHECK(Arena::create(options)->info().numa_node == 0);
  for (int node : {-2, 1000, 1 << 20}) {
    options.numa_node = node;
    try {
      Arena::create(options);
      CHECK(!"memory of a node that is not there");
    } catch (const Error& error) {
      CHECK(error.failure().kind == ErrorKind::kPinned);
    }
  }
}

// Faulting in ends when its time is up; the rest follows when it is used.
void test_prefault_is_bounded_in_time() {
  ArenaOptions options;
  options.nbytes = 8 << 20;
  options.cuda = UseCuda::kNo;
  options.prefault_limit_s = 0.0;
  const auto arena = Arena::create(options);
  CHECK(!arena->info().prefaulted);
  memset(arena->address(), 1, arena->nbytes());
}

// A file system that takes O_DIRECT and then refuses the read: the file goes on buffered, in the same descriptor.
void test_a_refused_direct_read_goes_on_buffered() {
  const auto log = std::make_shared<Log>(true), strict = std::make_shared<Log>(false);
  const auto file = File::open(path, Direct::kAuto, log);
  if (!file->direct()) {
    std::printf("  skipped: no O_DIRECT here (%s)\n", log->reasons.at(0).c_str());
    return;
  }
  char unaligned[3];
  CHECK(pread(file->fd(), unaligned + 1, 1, 1) == -1 && errno == EINVAL);
  CHECK(file->fall_back(EINVAL));
  CHECK(!file->direct() && file->resume_align() == 1 && file->drops_cache());
  CHECK(log->reasons.size() == 1 && log->reasons[0].find("EINVAL") != std::string::npos);
  CHECK(pread(file->fd(), unaligned + 1, 1, 1) == 1 && unaligned[1] == byte_at(1));
  CHECK(!File::open(path, Direct::kAuto, strict)->fall_back(EINVAL));
  CHECK(!File::open(path, Direct::kOn, log)->fall_back(EINVAL));
}

// A read that hangs in the kernel: its memory faults, and nobody answers the fault.
class Hang {
 public:
  Hang(char* address, size_t nbytes) : fd_(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC))) {
    if (fd_ < 0) return;
    uffdio_api api = {};
    api.api = UFFD_API;
    uffdio_register range = {};
    range.range = {reinterpret_cast<uintptr_t>(address), nbytes};
    range.mode = UFFDIO_REGISTER_MODE_MISSING;
    CHECK(ioctl(fd_, UFFDIO_API, &api) == 0 && ioctl(fd_, UFFDIO_REGISTER, &range) == 0);
  }
  ~Hang() {
    if (fd_ >= 0) close(fd_);  // faults go on
  }
  bool works() const { return fd_ >= 0; }

 private:
  int fd_;
};

void test_what_cannot_be_drained_is_leaked() {
  auto arena = make_arena(4 << 20, false);
  {
    Hang hang(arena->address(), 2 << 20);
    if (!hang.works()) {
      std::printf("  skipped: userfaultfd needs root\n");
      return;
    }
    ReaderOptions options = options_of(EngineKind::kThreads);
    options.close_limit_s = 0.3;
    Reader reader(options, nullptr);
    const auto request = reader.submit({{path, 0, 1 << 20}}, arena->lease(1 << 20, 0), 0);
    try {
      request->wait(0.2, nothing);
      CHECK(!"the read does not hang");
    } catch (const Error& error) {
      CHECK(error.failure().kind == ErrorKind::kTimeout);
    }
    CHECK(reader.close() == 1 << 20);
    CHECK(reader.info().leaked_bytes == 1 << 20 && arena->info().leaked_bytes == 1 << 20);
    CHECK(!outcome(*request));
    try {
      arena->lease(4096, 4096);
      CHECK(!"leaked memory was leased again");
    } catch (const Error& error) {
      CHECK(error.failure().kind == ErrorKind::kPinned);
    }
    CHECK(arena->lease(4096, std::nullopt)->offset() == 1 << 20);
    arena->close();
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(200));  // the stuck threads end
}

#ifdef MHAFFN_HAS_LIBURING
// Refuses io_uring_enter to all threads of this process, for good.
bool block_io_uring() {
  sock_filter program[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                           BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_enter, 0, 1),
                           BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
                           BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  const sock_fprog filter = {4, program};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter) == 0;
}

// While eight threads read: each request has its bytes, or fails with the errno and keeps its memory for ever. The
// last test, since nothing takes the filter away.
void test_an_io_uring_that_is_blocked_later() {
  constexpr size_t kLength = 1 << 20;
  auto arena = make_arena(kSubmitters * (24 << 20));
  ReaderOptions options = options_of(EngineKind::kAuto);
  Reader reader(options, arena);
  std::atomic<bool> blocked{false};
  std::atomic<size_t> lost{0}, after{0};
  auto work = [&](uint64_t seed) {
    std::mt19937_64 random(seed);
    for (size_t left = 20; left > 0;) {
      left -= blocked;
      const std::vector<Extent> extents = {{path, random() % (kFileBytes - kLength), kLength}};
      const auto lease = arena->lease(lay_out(extents).cover_bytes, std::nullopt);
      const auto request = reader.submit(extents, lease, 0);
      try {
        request->wait(30.0, nothing);
        check_bytes(*request, *lease, extents);
        after += blocked;
      } catch (const Error& error) {
        CHECK(error.failure().kind == ErrorKind::kRead && error.failure().error == EPERM);
        ++lost;
      }
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kSubmitters; ++i) threads.emplace_back(work, i);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const bool works = block_io_uring();
  blocked = true;
  for (std::thread& thread : threads) thread.join();
  if (!works) {
    std::printf("  skipped: no seccomp filters here\n");
    return;
  }
  const ReaderInfo info = reader.info();
  CHECK(info.engine == "threads" && info.reasons.size() == 1 && after > 0);
  CHECK(lost <= static_cast<size_t>(options.depth) && (info.leaked_bytes > 0) == (lost > 0));
  CHECK(arena->info().leaked_bytes == info.leaked_bytes && arena->info().leased_bytes == info.leaked_bytes);
  CHECK(reader.close() == info.leaked_bytes);
}
#endif

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc > 1);
  path = std::string(argv[1]) + "/reader_test.data";
  const int rounds = argc > 2 ? std::stoi(argv[2]) : 40;
  make_file();
  std::vector<std::pair<const char*, EngineKind>> engines = {{"threads", EngineKind::kThreads}};
#ifdef MHAFFN_HAS_LIBURING
  const std::string reason = why_no_uring();
  if (reason.empty()) {
    engines.push_back({"io_uring", EngineKind::kUring});
  } else {
    std::printf("  io_uring skipped: %s\n", reason.c_str());
  }
#endif
  for (const auto& [name, engine] : engines) {
    test_many_submitters(engine, rounds);
    for (int i = 0; i < 3; ++i) {
      test_close_in_flight(engine, true);
      test_close_in_flight(engine, false);
    }
    std::printf("reader_test: %s ok\n", name);
  }
  test_memory_is_near_the_gpu_where_there_is_a_choice();
  test_a_node_asked_for_is_used_or_refused();
  test_prefault_is_bounded_in_time();
  test_a_refused_direct_read_goes_on_buffered();
  test_what_cannot_be_drained_is_leaked();
#ifdef MHAFFN_HAS_LIBURING
  if (engines.size() > 1) test_an_io_uring_that_is_blocked_later();
#endif
  unlink(path.c_str());
  std::printf("reader_test: ok\n");
}
