// Files as the reader opens them: close on destruction, O_DIRECT where it works, its alignment known.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#include "engine_core.h"
#include "fallback.h"

namespace mhaffn {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd();
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

enum class Direct { kAuto, kOn, kOff };

// What identifies a version of a file.
struct FileIdentity {
  dev_t device = 0;
  ino_t inode = 0;
  uint64_t size = 0;
  int64_t modified_ns = 0;
  bool operator==(const FileIdentity& other) const {
    return device == other.device && inode == other.inode && size == other.size && modified_ns == other.modified_ns;
  }
};

class File : public Source, public std::enable_shared_from_this<File> {
 public:
  // Throws Error (op "open") where the file cannot be opened or is not a file or block device, and
  // where the direct mode asked for does not work.
  static std::shared_ptr<File> open(const std::string& path, Direct mode, std::shared_ptr<FallbackLog> log);

  const std::string& path() const override { return path_; }
  bool direct() const override { return direct_.load(std::memory_order_acquire); }
  uint32_t resume_align() const override { return direct() ? resume_align_ : 1; }
  uint64_t size() const override;
  bool fall_back(int error) override;

  int fd() const { return fd_.get(); }
  const FileIdentity& identity() const { return identity_; }
  // The page cache is of use to others where the caller asked for buffered reads; after a fallback it only
  // pushes out what is.
  bool drops_cache() const { return !direct() && mode_ != Direct::kOff; }
  // These bytes were read and will not be again: drops them from the page cache where it is of no use.
  void was_read(uint64_t offset, uint64_t count) const;

 private:
  File(std::string path, Direct mode, std::shared_ptr<FallbackLog> log)
      : path_(std::move(path)), mode_(mode), log_(std::move(log)) {}
  std::string why_not_direct();
  bool make_buffered();

  const std::string path_;
  const Direct mode_;
  std::shared_ptr<FallbackLog> log_;
  Fd fd_;
  FileIdentity identity_;
  uint32_t resume_align_ = 512;
  std::atomic<bool> direct_{false};
};

// Open files by path, least recently used first out. Used by one thread.
class FileCache {
 public:
  static constexpr size_t kCapacity = 128;

  FileCache(Direct mode, std::shared_ptr<FallbackLog> log) : mode_(mode), log_(std::move(log)) {}
  // Opens the file, unless the version of it that is there now is open already.
  std::shared_ptr<File> get(const std::string& path);
  void clear();

 private:
  const Direct mode_;
  std::shared_ptr<FallbackLog> log_;
  std::list<std::shared_ptr<File>> files_;
  std::unordered_map<std::string, std::list<std::shared_ptr<File>>::iterator> by_path_;
};

}  // namespace mhaffn
