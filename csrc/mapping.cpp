#include "mapping.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "clock.h"
#include "error.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif

namespace mhaffn {
namespace {

void touch(char* address, size_t nbytes) {
  for (size_t i = 0; i < nbytes; i += kPageBytes) const_cast<volatile char&>(address[i]) = 0;
}

}  // namespace

Mapping::Mapping(size_t nbytes) {
  const size_t align = nbytes >= kHugePageBytes ? kHugePageBytes : kPageBytes;
  nbytes_ = round_up(nbytes, align);
  if (nbytes == 0 || nbytes_ < nbytes) fail_pinned("cannot map " + std::to_string(nbytes) + " bytes");
  void* wide =
      mmap(nullptr, nbytes_ + align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (wide == MAP_FAILED) {
    fail_pinned("mapping " + std::to_string(nbytes_) + " bytes of host memory failed: " + errno_text(errno), errno);
  }
  char* start = static_cast<char*>(wide);
  address_ = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(start), align));
  if (address_ > start) munmap(start, static_cast<size_t>(address_ - start));
  char* const end = start + nbytes_ + align;
  if (end > address_ + nbytes_) munmap(address_ + nbytes_, static_cast<size_t>(end - address_ - nbytes_));
  madvise(address_, nbytes_, MADV_DONTFORK);
  if (align == kHugePageBytes) {
    madvise(address_, nbytes_, MADV_HUGEPAGE);
    // Named, it is seen in /proc/PID/smaps and does not merge with its neighbours there.
    prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, address_, nbytes_, "mhaffn arena");
  }
}

Mapping::~Mapping() {
  if (owner_.is_current()) munmap(address_, nbytes_);
}

bool prefault(char* address, size_t nbytes, double limit_s) {
  constexpr size_t kStep = 32 * kHugePageBytes;
  const double deadline = monotonic_s() + limit_s;
  std::atomic<size_t> next{0};
  std::atomic<int> error{0};
  auto work = [&] {
    for (size_t at; error == 0 && (at = next.fetch_add(kStep)) < nbytes;) {
      if (monotonic_s() > deadline) {
        error = ETIMEDOUT;
        return;
      }
      const size_t length = std::min(kStep, nbytes - at);
      while (madvise(address + at, length, MADV_POPULATE_WRITE) != 0) {
        if (errno == EINTR || errno == EAGAIN) continue;
        if (errno == EINVAL) {
          touch(address + at, length);  // before Linux 5.14
          break;
        }
        error = errno;
        return;
      }
    }
  };
  cpu_set_t cpus;
  const unsigned usable = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
  const size_t count = std::min<size_t>({usable, 16, (nbytes + kStep - 1) / kStep});
  std::vector<std::thread> threads;
  try {
    for (size_t i = 1; i < count; ++i) threads.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads to be had: those that are there do the work
  }
  work();
  for (std::thread& thread : threads) thread.join();
  if (error != 0 && error != ETIMEDOUT) {
    fail_pinned("faulting in " + std::to_string(nbytes) + " bytes failed: " + errno_text(error), error);
  }
  return error == 0;
}

double huge_page_share(const char* address, size_t nbytes) {
  std::ifstream file("/proc/self/smaps");
  std::string line;
  const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + nbytes;
  double size = 0, huge = 0;
  bool inside = false;
  while (std::getline(file, line)) {
    unsigned long from = 0, to = 0;
    char space = 0;
    if (sscanf(line.c_str(), "%lx-%lx%c", &from, &to, &space) == 3 && space == ' ') {
      inside = from < end && to > begin;
      if (inside) size += static_cast<double>(to - from) / 1024;
    } else if (inside && line.rfind("AnonHugePages:", 0) == 0) {
      huge += std::stod(line.substr(14));
    }
  }
  return size > 0 ? huge / size : 0.0;
}

}  // namespace mhaffn
