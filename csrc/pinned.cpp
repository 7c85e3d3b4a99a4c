#include "pinned.h"

#include <dlfcn.h>
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <sstream>
#include <thread>
#include <vector>

#include "clock.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif

namespace mhaffn {
namespace {

// CUDA's driver library as found at run time: one build serves machines with and without it.
class Cuda {
 public:
  static Cuda& instance() {
    static Cuda* cuda = new Cuda;  // never destroyed: registrations may outlive static destruction
    return *cuda;
  }

  // Empty where a device can be used; otherwise why not.
  const std::string& reason() const { return reason_; }

  // Empty on success; otherwise why not.
  std::string register_memory(void* address, size_t nbytes) {
    Context context(*this);
    if (!context.error.empty()) return context.error;
    constexpr unsigned kPortable = 1;
    return describe(host_register_(address, nbytes, kPortable), "cuMemHostRegister");
  }

  void unregister_memory(void* address) {
    Context context(*this);
    if (context.error.empty()) host_unregister_(address);
  }

  int numa_node() {
    char bus[32] = {};
    if (!reason_.empty() || pci_bus_id_(bus, sizeof bus, device_) != 0) return -1;
    std::string name(bus);
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
    int node = -1;
    std::ifstream("/sys/bus/pci/devices/" + name + "/numa_node") >> node;
    return node;
  }

 private:
  // The device's primary context, the one PyTorch uses, current for as long as this lives.
  struct Context {
    explicit Context(Cuda& cuda) : cuda(cuda) {
      void* context = nullptr;
      error = cuda.describe(cuda.retain_(&context, cuda.device_), "cuDevicePrimaryCtxRetain");
      if (!error.empty()) return;
      error = cuda.describe(cuda.push_(context), "cuCtxPushCurrent");
      if (!error.empty()) cuda.release_(cuda.device_);
    }
    ~Context() {
      if (!error.empty()) return;
      void* context = nullptr;
      cuda.pop_(&context);
      // The context is kept: memory registered in it must stay registered.
    }
    Cuda& cuda;
    std::string error;
  };

  Cuda() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      reason_ = "no CUDA driver (libcuda.so.1 not found)";
      return;
    }
    bool complete = true;
    auto load = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      complete = complete && function;
    };
    int (*init)(unsigned) = nullptr;
    int (*count_devices)(int*) = nullptr;
    int (*get_device)(int*, int) = nullptr;
    load(init, "cuInit");
    load(count_devices, "cuDeviceGetCount");
    load(get_device, "cuDeviceGet");
    load(retain_, "cuDevicePrimaryCtxRetain");
    load(release_, "cuDevicePrimaryCtxRelease_v2");
    load(push_, "cuCtxPushCurrent_v2");
    load(pop_, "cuCtxPopCurrent_v2");
    load(host_register_, "cuMemHostRegister_v2");
    load(host_unregister_, "cuMemHostUnregister");
    load(pci_bus_id_, "cuDeviceGetPCIBusId");
    load(error_string_, "cuGetErrorString");
    if (!complete) {
      reason_ = "the CUDA driver lacks functions that are needed";
      return;
    }
    int devices = 0;
    reason_ = describe(init(0), "cuInit");
    if (reason_.empty()) reason_ = describe(count_devices(&devices), "cuDeviceGetCount");
    if (reason_.empty() && devices == 0) reason_ = "no CUDA device";
    if (reason_.empty()) reason_ = describe(get_device(&device_, 0), "cuDeviceGet");
  }

  std::string describe(int status, const char* call) const {
    if (status == 0) return "";
    const char* text = nullptr;
    error_string_(status, &text);
    return std::string(call) + ": " + (text ? text : "CUDA error " + std::to_string(status));
  }

  std::string reason_;
  int device_ = 0;
  int (*retain_)(void**, int) = nullptr;
  int (*release_)(int) = nullptr;
  int (*push_)(void*) = nullptr;
  int (*pop_)(void**) = nullptr;
  int (*host_register_)(void*, size_t, unsigned) = nullptr;
  int (*host_unregister_)(void*) = nullptr;
  int (*pci_bus_id_)(char*, int, int) = nullptr;
  int (*error_string_)(int, const char**) = nullptr;
};

size_t available_bytes() {
  std::ifstream file("/proc/meminfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("MemAvailable:", 0) == 0) return std::stoull(line.substr(13)) * 1024;
  }
  return SIZE_MAX;
}

unsigned numa_nodes() {
  std::ifstream file("/sys/devices/system/node/online");
  std::string online;
  file >> online;
  const size_t last = online.find_last_of("-,");
  return last == std::string::npos ? 1 : static_cast<unsigned>(std::stoul(online.substr(last + 1))) + 1;
}

// Preferred, not bound: memory on a far node is better than none.
bool prefer_node(char* address, size_t nbytes, int node) {
  constexpr int kPreferred = 1;
  unsigned long mask[16] = {};
  if (node < 0 || node >= static_cast<int>(sizeof mask * 8)) return false;
  mask[node / (8 * sizeof(long))] = 1UL << (node % (8 * sizeof(long)));
  return syscall(SYS_mbind, address, nbytes, kPreferred, mask, sizeof mask * 8, 0) == 0;
}

void touch(char* address, size_t nbytes) {
  for (size_t i = 0; i < nbytes; i += kPageBytes) const_cast<volatile char&>(address[i]) = 0;
}

// Faults all pages in, several threads at once. False when `limit_s` ran out first.
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
  for (size_t i = 1; i < count; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  if (error != 0 && error != ETIMEDOUT) {
    fail_pinned("faulting in " + std::to_string(nbytes) + " bytes failed: " + errno_text(error), error);
  }
  return error == 0;
}

// The share of the mapping that lies in huge pages.
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

}  // namespace

class CudaRegistration {
 public:
  explicit CudaRegistration(std::shared_ptr<Mapping> mapping) : mapping_(std::move(mapping)) {}
  ~CudaRegistration() {
    if (owner_.is_current()) Cuda::instance().unregister_memory(mapping_->address());
  }

 private:
  Process owner_;
  std::shared_ptr<Mapping> mapping_;
};

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

Lease::Lease(std::shared_ptr<Arena> arena, size_t offset, size_t nbytes)
    : arena_(std::move(arena)), offset_(offset), nbytes_(nbytes) {}

Lease::~Lease() {
  if (arena_->owner().is_current()) arena_->release(offset_);
}

char* Lease::address() const { return arena_->address() + offset_; }

std::shared_ptr<Arena> Arena::create(const ArenaOptions& options) { return std::shared_ptr<Arena>(new Arena(options)); }

Arena::Arena(const ArenaOptions& options) {
  const size_t nbytes = round_up(options.nbytes, kHugePageBytes);
  const size_t available = available_bytes();
  if (options.prefault && nbytes > available) {
    fail_pinned("an arena of " + std::to_string(nbytes) + " bytes does not fit: " + std::to_string(available) +
                " bytes of host memory are available; lower the DRAM budget or free memory");
  }
  mapping_ = std::make_shared<Mapping>(std::max(nbytes, kHugePageBytes));
  info_.nbytes = mapping_->nbytes();
  const bool cuda = options.cuda != UseCuda::kNo;
  info_.cuda_reason = cuda ? Cuda::instance().reason() : "not asked for";
  if (options.cuda == UseCuda::kYes && !info_.cuda_reason.empty()) {
    fail_pinned("the arena cannot be registered with CUDA: " + info_.cuda_reason);
  }

  int node = options.numa_node;
  if (node < 0 && numa_nodes() > 1 && info_.cuda_reason.empty()) node = Cuda::instance().numa_node();
  if (node >= 0 && prefer_node(address(), this->nbytes(), node)) info_.numa_node = node;

  if (options.prefault) {
    const double start = monotonic_s();
    info_.prefaulted = prefault(address(), this->nbytes(), options.prefault_limit_s);
    info_.prefault_s = monotonic_s() - start;
  }
  if (info_.cuda_reason.empty()) {
    const double start = monotonic_s();
    info_.cuda_reason = Cuda::instance().register_memory(address(), this->nbytes());
    info_.register_s = monotonic_s() - start;
    info_.cuda_registered = info_.cuda_reason.empty();
    if (info_.cuda_registered) registration_ = std::make_unique<CudaRegistration>(mapping_);
    if (options.cuda == UseCuda::kYes && !info_.cuda_registered) {
      fail_pinned("registering " + std::to_string(this->nbytes()) + " bytes with CUDA failed: " + info_.cuda_reason);
    }
  }
  info_.huge_page_share = huge_page_share(address(), this->nbytes());
}

Arena::~Arena() = default;

std::shared_ptr<Lease> Arena::lease(size_t nbytes, std::optional<size_t> offset) {
  owner_.require("this PinnedArena");
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) fail_pinned("the arena is closed");
  const size_t pages = round_up(nbytes, kPageBytes);
  if (nbytes == 0 || pages < nbytes || pages > this->nbytes()) {
    fail_pinned("cannot lease " + std::to_string(nbytes) + " bytes of an arena of " + std::to_string(this->nbytes()));
  }
  if (!offset) {
    offset = first_fit(pages);
    if (*offset == SIZE_MAX) {
      fail_pinned("no " + std::to_string(pages) +
                  " contiguous bytes are free in the arena: " + std::to_string(info_.leased_bytes) + " of " +
                  std::to_string(this->nbytes()) + " are leased; release slots first or make it larger");
    }
  } else {
    if (*offset % kPageBytes != 0) {
      fail_pinned("a lease starts at a multiple of 4096 bytes, got " + std::to_string(*offset));
    }
    if (*offset > this->nbytes() - pages) {
      fail_pinned("a lease of " + std::to_string(pages) + " bytes at " + std::to_string(*offset) +
                  " passes the end of the arena at " + std::to_string(this->nbytes()));
    }
    auto after = leases_.lower_bound(*offset);
    const bool into_next = after != leases_.end() && after->first < *offset + pages;
    const bool into_last = after != leases_.begin() && std::prev(after)->first + std::prev(after)->second > *offset;
    if (into_next || into_last) {
      fail_pinned("bytes " + std::to_string(*offset) + " to " + std::to_string(*offset + pages) +
                  " of the arena overlap a live lease; release it first (a read still in flight holds its memory)");
    }
  }
  auto lease = std::make_shared<Lease>(shared_from_this(), *offset, nbytes);
  leases_[*offset] = pages;
  info_.leased_bytes += pages;
  info_.peak_leased_bytes = std::max(info_.peak_leased_bytes, info_.leased_bytes);
  return lease;
}

size_t Arena::first_fit(size_t pages) const {
  size_t at = 0;
  for (const auto& [offset, nbytes] : leases_) {
    if (offset - at >= pages) return at;
    at = offset + nbytes;
  }
  return nbytes() - at >= pages ? at : SIZE_MAX;
}

void Arena::release(size_t offset) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = leases_.find(offset);
  if (found == leases_.end()) return;
  info_.leased_bytes -= found->second;
  leases_.erase(found);
}

ArenaInfo Arena::info() const {
  owner_.require("this PinnedArena");
  std::lock_guard<std::mutex> lock(mutex_);
  ArenaInfo info = info_;
  info.leaked_bytes = leaked_bytes_;
  return info;
}

void Arena::close() {
  owner_.require("this PinnedArena");
  std::lock_guard<std::mutex> lock(mutex_);
  if (info_.leased_bytes > leaked_bytes_) {
    fail_pinned("the arena cannot be closed: " + std::to_string(info_.leased_bytes - leaked_bytes_) +
                " bytes are leased; release the slots and close the reader first");
  }
  closed_ = true;
}

void Arena::leak(std::shared_ptr<Lease> lease) {
  Arena& arena = *lease->arena();
  std::lock_guard<std::mutex> lock(arena.mutex_);
  static auto* leaked = new std::vector<std::shared_ptr<Lease>>;
  static auto* guard = new std::mutex;
  std::lock_guard<std::mutex> guarded(*guard);
  for (const auto& known : *leaked) {
    if (known == lease) return;
  }
  arena.leaked_bytes_ += round_up(lease->nbytes(), kPageBytes);
  leaked->push_back(std::move(lease));
}

}  // namespace mhaffn
