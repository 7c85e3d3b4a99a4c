// The GIL let go of, in a way that outlives the interpreter.
#pragma once

#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

#include <utility>

namespace mhaffn {

// Without the GIL from here on. A daemon thread that the interpreter leaves behind when it ends cannot have it
// back: before Python 3.14 it is made to exit there, which ends the process where a destructor is on the way.
// Here it stays where it is, as it does in 3.14.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;
  ~GilReleased() { acquire(); }

  void acquire() {
    if (!state_) return;
    try {
      PyEval_RestoreThread(std::exchange(state_, nullptr));
    } catch (abi::__forced_unwind&) {
      for (;;) pause();
    }
  }

  void release() { state_ = PyEval_SaveThread(); }

 private:
  PyThreadState* state_;
};

}  // namespace mhaffn
