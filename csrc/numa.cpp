#include "numa.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <fstream>
#include <set>
#include <sstream>

namespace mhaffn {
namespace {

constexpr int kMostNodes = 1024;

// The kernel's lists: "0-1,4". Empty where it is anything else.
std::set<int> parse_list(const std::string& text) {
  std::set<int> members;
  std::istringstream ranges(text);
  std::string range;
  while (std::getline(ranges, range, ',')) {
    std::istringstream bounds(range);
    int first = -1, last = -1;
    char dash = 0;
    bounds >> first;
    if (bounds && bounds >> dash) {
      if (dash != '-' || !(bounds >> last)) return {};
    } else {
      last = first;
    }
    if (first < 0 || last < first || last >= kMostNodes || bounds >> dash) return {};
    for (int member = first; member <= last; ++member) members.insert(member);
  }
  return members;
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

}  // namespace

int near_node(const std::string& sysfs, const std::string& pci_address) {
  const std::set<int> nodes = parse_list(first_line(sysfs + "/devices/system/node/has_memory"));
  if (nodes.size() < 2 || pci_address.empty()) return -1;
  std::istringstream text(first_line(sysfs + "/bus/pci/devices/" + pci_address + "/numa_node"));
  int node = -1;
  return text >> node && nodes.count(node) == 1 ? node : -1;
}

int prefer_node(char* address, size_t nbytes, int node) {
  constexpr int kPreferred = 1;
  constexpr int kBits = 8 * sizeof(long);
  unsigned long mask[kMostNodes / kBits] = {};
  if (node < 0 || node >= kMostNodes) return EINVAL;
  mask[node / kBits] = 1UL << (node % kBits);
  return syscall(SYS_mbind, address, nbytes, kPreferred, mask, sizeof mask * 8, 0) == 0 ? 0 : errno;
}

}  // namespace mhaffn
