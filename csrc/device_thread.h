// One device: a thread that drives an engine core over a ring.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine_core.h"
#include "reader.h"
#include "rings.h"
#include "thread.h"

namespace mhaffn {

class DeviceThread {
 public:
  DeviceThread(std::string device, bool direct, EngineKind engine, RingSetup setup);
  static void start(const std::shared_ptr<DeviceThread>& self);

  void add(std::shared_ptr<Job> job);
  // Makes it look for new and stopped jobs now.
  void poke();
  // Ends the thread once nothing is in flight.
  void stop();
  void join_until(double deadline_s) { thread_.join_until(deadline_s); }
  DeviceInfo info() const;

 private:
  static constexpr double kStallS = 30.0;
  static constexpr double kDrainS = 1.0;

  void run();
  std::unique_ptr<WakeableRing> make_ring();
  // Goes on without a ring that takes nothing any more, or sets `failure` where it may not.
  void step_down(EngineCore& core, std::unique_ptr<WakeableRing>& ring, Failure& failure);
  // Under the lock.
  void describe(const std::string& engine, const RingFeatures& features);
  void publish(WakeableRing* ring);
  // Moves new jobs into the core; true when stopping.
  bool take(EngineCore& core);
  // Without a ring every job fails, until the reader is closed.
  void fail_all(const Failure& failure);

  const std::string device_;
  const bool direct_;
  const EngineKind engine_;
  RingSetup setup_;
  mutable std::mutex mutex_;
  std::condition_variable change_;  // for when there is no ring to wake
  std::vector<std::shared_ptr<Job>> jobs_;
  WakeableRing* ring_ = nullptr;
  bool poked_ = false;
  bool stopping_ = false;
  bool hungry_ = true;  // a new job could be started at once
  DeviceInfo info_;
  CoreCounts counts_;
  Thread thread_;
};

}  // namespace mhaffn
