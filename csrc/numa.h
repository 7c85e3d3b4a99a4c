// Which memory is near a device, and how to get it.
#pragma once

#include <cstddef>
#include <string>

namespace mhaffn {

// The node of the PCI device at `pci_address` ("0000:3b:00.0"), according to the sysfs mounted at `sysfs`; -1 where
// there is no choice of nodes with memory, or where sysfs does not say.
int near_node(const std::string& sysfs, const std::string& pci_address);

// Has what is not faulted in yet come from `node`: preferred, not bound, since memory on a far node is better than
// none. 0, or the errno.
int prefer_node(char* address, size_t nbytes, int node);

}  // namespace mhaffn
