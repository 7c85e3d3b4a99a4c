// The least io_uring loop that reads a file with O_DIRECT: what the device gives when nothing else is done.
//
//   g++ -O2 -std=c++17 bench/read_loop.cpp -l:liburing.a -o build/read_loop      (-static to carry it elsewhere)
//   build/read_loop FILE BLOCK_BYTES DEPTH [MEMORY_BYTES [unregistered]]
//
// Prints bytes, seconds, seconds of CPU. Reads go round in MEMORY_BYTES of memory, by default as little as the
// depth needs: where a disk is made of memory, the processor's caches then hold it.
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#include <algorithm>
#include <deque>
#include <string>
#include <vector>

static double clock_s(clockid_t id) {
  timespec time;
  clock_gettime(id, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

static void require(bool condition, const char* what) {
  if (condition) return;
  perror(what);
  exit(1);
}

int main(int argc, char** argv) {
  require(argc >= 4, "usage: read_loop FILE BLOCK_BYTES DEPTH [MEMORY_BYTES [unregistered]]");
  const size_t block = std::stoul(argv[2]);
  const unsigned depth = static_cast<unsigned>(std::stoul(argv[3]));
  const int fd = open(argv[1], O_RDONLY | O_DIRECT);
  struct stat status;
  require(fd >= 0 && fstat(fd, &status) == 0, "open");
  const size_t blocks = static_cast<size_t>(status.st_size) / block;

  constexpr size_t kHuge = 2 << 20;
  const size_t places = std::max<size_t>(depth, argc > 4 ? std::stoul(argv[4]) / block : 0);
  const bool registered = argc <= 5;
  const size_t bytes = (block * places + kHuge - 1) / kHuge * kHuge;
  char* wide =
      static_cast<char*>(mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  require(wide != MAP_FAILED, "mmap");
  char* memory = wide + (kHuge - reinterpret_cast<size_t>(wide) % kHuge) % kHuge;
  madvise(memory, bytes, MADV_HUGEPAGE);
  for (size_t i = 0; i < bytes; i += 4096) memory[i] = 1;

  io_uring ring;
  errno = -io_uring_queue_init(depth, &ring, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
  require(errno == 0, "io_uring_queue_init");
  std::vector<iovec> buffers;
  std::deque<unsigned> free;
  for (unsigned i = 0; i < places; ++i) {
    buffers.push_back({memory + i * block, block});
    free.push_back(i);
  }
  errno = registered ? -io_uring_register_buffers(&ring, buffers.data(), static_cast<unsigned>(places)) : 0;
  require(errno == 0, "io_uring_register_buffers");
  errno = -io_uring_register_files(&ring, &fd, 1);
  require(errno == 0, "io_uring_register_files");

  const double start = clock_s(CLOCK_MONOTONIC), cpu = clock_s(CLOCK_PROCESS_CPUTIME_ID);
  size_t next = 0, done = 0;
  auto read_next = [&] {
    const unsigned place = free.front();
    free.pop_front();
    io_uring_sqe* sqe = io_uring_get_sqe(&ring);
    io_uring_prep_read(sqe, 0, memory + place * block, static_cast<unsigned>(block), next++ * block);
    if (registered) {
      sqe->opcode = IORING_OP_READ_FIXED;
      sqe->buf_index = static_cast<uint16_t>(place);
    }
    sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data64(sqe, place);
  };
  for (unsigned i = 0; i < depth && next < blocks; ++i) read_next();
  while (done < blocks) {
    io_uring_submit_and_wait(&ring, 1);
    io_uring_cqe* cqe;
    while (io_uring_peek_cqe(&ring, &cqe) == 0) {
      errno = cqe->res < 0 ? -cqe->res : EIO;
      require(cqe->res == static_cast<int>(block), "read");
      free.push_back(static_cast<unsigned>(io_uring_cqe_get_data64(cqe)));
      io_uring_cqe_seen(&ring, cqe);
      ++done;
      if (next < blocks) read_next();
    }
  }
  printf("%zu %.6f %.6f\n", blocks * block, clock_s(CLOCK_MONOTONIC) - start, clock_s(CLOCK_PROCESS_CPUTIME_ID) - cpu);
}
