#include "cuda.h"

#include <dlfcn.h>

#include <cctype>
#include <type_traits>

namespace mhaffn {

// The device's primary context, the one PyTorch uses, current for as long as this lives.
struct Cuda::Context {
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

Cuda& Cuda::instance() {
  static Cuda* cuda = new Cuda;  // never destroyed: registrations may outlive static destruction
  return *cuda;
}

Cuda::Cuda() {
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

std::string Cuda::register_memory(void* address, size_t nbytes) {
  Context context(*this);
  if (!context.error.empty()) return context.error;
  constexpr unsigned kPortable = 1;
  return describe(host_register_(address, nbytes, kPortable), "cuMemHostRegister");
}

void Cuda::unregister_memory(void* address) {
  Context context(*this);
  if (context.error.empty()) host_unregister_(address);
}

std::string Cuda::pci_address() const {
  char text[32] = {};
  if (!reason_.empty() || pci_bus_id_(text, sizeof text, device_) != 0) return "";
  std::string address(text);
  for (char& c : address) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return address;
}

std::string Cuda::describe(int status, const char* call) const {
  if (status == 0) return "";
  const char* text = nullptr;
  error_string_(status, &text);
  return std::string(call) + ": " + (text ? text : "CUDA error " + std::to_string(status));
}

}  // namespace mhaffn
