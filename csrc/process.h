// The process an object belongs to.
#pragma once

#include <unistd.h>

#include <string>

#include "error.h"

namespace mhaffn {

// Memory, threads and rings are not shared with a fork: each object knows the process that made it.
class Process {
 public:
  Process() : id_(getpid()) {}
  bool is_current() const { return getpid() == id_; }
  // Throws Error(kUnavailable) in a fork of the process.
  void require(const char* what) const {
    if (!is_current()) {
      fail_unavailable(std::string(what) + " belongs to process " + std::to_string(id_) +
                       " and does not work in its fork " + std::to_string(getpid()) +
                       ": make new ones there (multiprocessing: start method \"spawn\")");
    }
  }

 private:
  const pid_t id_;
};

}  // namespace mhaffn
