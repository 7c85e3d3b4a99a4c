// The preadv engine: as many threads as reads in flight, the same contract as io_uring.
#include <errno.h>
#include <sys/uio.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

#include "clock.h"
#include "rings.h"

namespace mhaffn {
namespace {

// What the ring and its workers share; a worker stuck in the kernel keeps it alive.
struct Exchange {
  std::mutex mutex;
  std::condition_variable work;
  std::condition_variable change;
  std::deque<Read> reads;
  std::vector<Completion> completions;
  bool woken = false;
  bool stopping = false;
};

int32_t read_now(const Read& read) {
  auto* file = static_cast<File*>(read.source);
  iovec vector = {read.address, read.length};
  const ssize_t count = preadv(file->fd(), &vector, 1, static_cast<off_t>(read.offset));
  if (count < 0) return -errno;
  file->was_read(read.offset, static_cast<uint64_t>(count));
  return static_cast<int32_t>(count);
}

void work(const std::shared_ptr<Exchange>& exchange) {
  std::unique_lock<std::mutex> lock(exchange->mutex);
  for (;;) {
    exchange->work.wait(lock, [&] { return exchange->stopping || !exchange->reads.empty(); });
    if (exchange->reads.empty()) return;
    const Read read = exchange->reads.front();
    exchange->reads.pop_front();
    lock.unlock();
    const int32_t result = read_now(read);
    lock.lock();
    exchange->completions.push_back({read.token, result});
    exchange->change.notify_one();
  }
}

class ThreadRing : public WakeableRing {
 public:
  // Fewer threads than `depth` where the system gives no more; reads then wait their turn.
  explicit ThreadRing(unsigned depth) : exchange_(std::make_shared<Exchange>()) {
    threads_.reserve(depth);
    try {
      for (unsigned i = 0; i < depth; ++i) threads_.emplace_back([exchange = exchange_] { work(exchange); });
    } catch (const std::system_error& error) {
      if (threads_.empty()) fail_unavailable(std::string("no thread could be started: ") + error.what());
    }
  }

  size_t threads() const { return threads_.size(); }

  ~ThreadRing() override {
    {
      std::lock_guard<std::mutex> lock(exchange_->mutex);
      exchange_->stopping = true;
    }
    exchange_->work.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  double now() override { return monotonic_s(); }

  void submit(const Read& read) override {
    {
      std::lock_guard<std::mutex> lock(exchange_->mutex);
      exchange_->reads.push_back(read);
    }
    exchange_->work.notify_one();
  }

  void cancel(uint64_t token) override {
    std::lock_guard<std::mutex> lock(exchange_->mutex);
    auto& reads = exchange_->reads;
    for (auto read = reads.begin(); read != reads.end(); ++read) {
      if (read->token != token) continue;
      exchange_->completions.push_back({token, -ECANCELED});
      reads.erase(read);
      return;
    }
  }

  size_t complete(Completion* completions, size_t capacity, double wait_s) override {
    std::unique_lock<std::mutex> lock(exchange_->mutex);
    exchange_->change.wait_for(lock, std::chrono::duration<double>(wait_s),
                               [&] { return exchange_->woken || !exchange_->completions.empty(); });
    exchange_->woken = false;
    auto& arrived = exchange_->completions;
    const size_t count = std::min(capacity, arrived.size());
    std::copy(arrived.begin(), arrived.begin() + static_cast<std::ptrdiff_t>(count), completions);
    arrived.erase(arrived.begin(), arrived.begin() + static_cast<std::ptrdiff_t>(count));
    return count;
  }

  void wake() override {
    std::lock_guard<std::mutex> lock(exchange_->mutex);
    exchange_->woken = true;
    exchange_->change.notify_one();
  }

 private:
  std::shared_ptr<Exchange> exchange_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<WakeableRing> make_thread_ring(const RingSetup& setup, RingFeatures& features) {
  auto ring = std::make_unique<ThreadRing>(setup.depth);
  features.detail = std::to_string(ring->threads()) + " preadv threads";
  return ring;
}

}  // namespace mhaffn
