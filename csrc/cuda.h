// CUDA's driver library as found at run time: one build serves machines with and without it.
#pragma once

#include <cstddef>
#include <string>

namespace mhaffn {

class Cuda {
 public:
  static Cuda& instance();

  // Empty where a device can be used; otherwise why not.
  const std::string& reason() const { return reason_; }
  // Page-locks memory for all contexts. Empty on success; otherwise why not.
  std::string register_memory(void* address, size_t nbytes);
  void unregister_memory(void* address);
  // As in sysfs, "0000:3b:00.0"; empty where there is none.
  std::string pci_address() const;

 private:
  struct Context;

  Cuda();
  std::string describe(int status, const char* call) const;

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

}  // namespace mhaffn
