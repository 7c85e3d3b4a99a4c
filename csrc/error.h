// The only throw helpers: what went wrong, with everything a reader of the message needs.
#pragma once

#include <string.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace mhaffn {

enum class ErrorKind { kRead, kTruncated, kTimeout, kCancelled, kUnavailable, kPinned };

// `offset` and `length` are in bytes of the file; `error` is an errno, 0 where no system call failed.
struct Failure {
  ErrorKind kind = ErrorKind::kRead;
  std::string message;
  std::string op = "read";
  std::string path;
  uint64_t offset = 0;
  uint64_t length = 0;
  int error = 0;
};

class Error : public std::runtime_error {
 public:
  explicit Error(Failure failure) : std::runtime_error(failure.message), failure_(std::move(failure)) {}
  const Failure& failure() const { return failure_; }

 private:
  Failure failure_;
};

inline std::string errno_text(int error) {
  const char* name = strerrorname_np(error);
  const char* description = strerrordesc_np(error);
  return std::string(name ? name : "errno " + std::to_string(error)) + " (" + (description ? description : "?") + ")";
}

[[noreturn]] inline void fail_unavailable(const std::string& message, int error = 0) {
  Failure failure;
  failure.kind = ErrorKind::kUnavailable;
  failure.message = message;
  failure.error = error;
  throw Error(std::move(failure));
}

[[noreturn]] inline void fail_closed() {
  Failure failure;
  failure.kind = ErrorKind::kCancelled;
  failure.op = "submit";
  failure.message = "the reader is closed";
  throw Error(std::move(failure));
}

[[noreturn]] inline void fail_pinned(const std::string& message, int error = 0) {
  Failure failure;
  failure.kind = ErrorKind::kPinned;
  failure.message = message;
  failure.error = error;
  throw Error(std::move(failure));
}

}  // namespace mhaffn
