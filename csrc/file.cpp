#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "mapping.h"

namespace mhaffn {
namespace {

[[noreturn]] void fail_open(const std::string& path, int error, const std::string& detail = "") {
  Failure failure;
  failure.op = "open";
  failure.path = path;
  failure.error = error;
  failure.message = path + ": opening failed: " + (detail.empty() ? errno_text(error) : detail);
  throw Error(std::move(failure));
}

FileIdentity identity_of(const struct stat& status) {
  return {status.st_dev, status.st_ino, static_cast<uint64_t>(status.st_size),
          status.st_mtim.tv_sec * 1000000000LL + status.st_mtim.tv_nsec};
}

// One block read directly: a successful open proves nothing. 0, or the errno.
int try_direct_read(int fd) {
  Mapping page(kPageBytes);
  ssize_t count;
  do {
    count = pread(fd, page.address(), kPageBytes, 0);
  } while (count < 0 && errno == EINTR);
  return count < 0 && (errno == EINVAL || errno == EOPNOTSUPP) ? errno : 0;
}

}  // namespace

Fd::~Fd() {
  if (fd_ >= 0) close(fd_);
}

std::shared_ptr<File> File::open(const std::string& path, Direct mode, std::shared_ptr<FallbackLog> log) {
  std::shared_ptr<File> file(new File(path, mode, log));
  // Without O_NONBLOCK a named pipe would hold the opener for as long as nobody writes to it.
  file->fd_ = Fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file->fd_) fail_open(path, errno);
  struct stat status;
  if (fstat(file->fd(), &status) != 0) fail_open(path, errno);
  if (S_ISDIR(status.st_mode)) fail_open(path, EISDIR);
  if (!S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode)) fail_open(path, EINVAL, "not a file or block device");
  file->identity_ = identity_of(status);
  if (S_ISBLK(status.st_mode)) file->identity_.device = status.st_rdev;
  if (fcntl(file->fd(), F_SETFL, 0) != 0) fail_open(path, errno);
  const std::string refusal = mode == Direct::kOff ? "" : file->why_not_direct();
  if (mode != Direct::kOff && refusal.empty()) {
    file->direct_ = true;
  } else {
    if (!refusal.empty() && (mode == Direct::kOn || !log->allow(refusal + ": buffered reads", path))) {
      fail_unavailable(path + ": O_DIRECT does not work here: " + refusal +
                       "; use direct=\"auto\" or \"off\", or keep the file on ext4 or xfs");
    }
    if (!file->make_buffered()) fail_open(path, errno);
  }
  return file;
}

// Turns O_DIRECT on; a reason where it does not work.
std::string File::why_not_direct() {
#ifdef STATX_DIOALIGN
  struct statx extended = {};
  const bool known =
      statx(fd(), "", AT_EMPTY_PATH, STATX_DIOALIGN, &extended) == 0 && (extended.stx_mask & STATX_DIOALIGN) != 0;
  const uint32_t sector = known ? extended.stx_dio_offset_align : 0;
  const uint32_t memory = known ? extended.stx_dio_mem_align : 0;
#else
  const bool known = false;
  const uint32_t sector = 0, memory = 0;
#endif
  if (known && sector == 0) return "the file system does no direct reads of this file";
  if (sector > kPageBytes || memory > kPageBytes) {
    return "direct reads here need an alignment of " + std::to_string(std::max(sector, memory)) + " bytes";
  }
  struct statfs system;
  if (fstatfs(fd(), &system) == 0 && (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC)) {
    return "the file is in memory already (tmpfs reports no DIOALIGN)";
  }
  if (fcntl(fd(), F_SETFL, O_DIRECT) != 0) return "O_DIRECT refused: " + errno_text(errno);
  if (!known) {
    if (const int error = try_direct_read(fd())) return "direct trial read failed: " + errno_text(error);
  }
  resume_align_ = sector ? sector : 512;
  return "";
}

bool File::make_buffered() {
  if (fcntl(fd(), F_SETFL, 0) != 0) return false;
  posix_fadvise(fd(), 0, 0, POSIX_FADV_SEQUENTIAL);
  direct_.store(false, std::memory_order_release);
  return true;
}

void File::was_read(uint64_t offset, uint64_t count) const {
  if (!drops_cache()) return;
  posix_fadvise(fd(), static_cast<off_t>(offset), static_cast<off_t>(count), POSIX_FADV_DONTNEED);
}

uint64_t File::size() const {
  const off_t end = lseek(fd(), 0, SEEK_END);  // unlike fstat(), right for block devices too
  return end < 0 ? UINT64_MAX : static_cast<uint64_t>(end);
}

bool File::fall_back(int error) {
  if (mode_ == Direct::kOn) return false;
  if (!log_->allow("a direct read failed with " + errno_text(error) + ": buffered reads", path_)) return false;
  log_->lost_direct_reads();
  return make_buffered();
}

std::shared_ptr<File> FileCache::get(const std::string& path) {
  auto found = by_path_.find(path);
  if (found != by_path_.end()) {
    struct stat status;
    if (stat(path.c_str(), &status) != 0) fail_open(path, errno);
    FileIdentity identity = identity_of(status);
    if (S_ISBLK(status.st_mode)) identity.device = status.st_rdev;
    if (identity == (*found->second)->identity()) {
      files_.splice(files_.begin(), files_, found->second);
      return files_.front();
    }
    files_.erase(found->second);
    by_path_.erase(found);
  }
  files_.push_front(File::open(path, mode_, log_));
  by_path_[path] = files_.begin();
  if (files_.size() > kCapacity) {
    by_path_.erase(files_.back()->path());
    files_.pop_back();
  }
  return files_.front();
}

void FileCache::clear() {
  files_.clear();
  by_path_.clear();
}

}  // namespace mhaffn
