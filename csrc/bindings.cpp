// The Python surface: conversions and the GIL, no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "gil.h"
#include "pinned.h"
#include "reader.h"

namespace py = pybind11;

namespace mhaffn {
namespace {

// The interchange structures of DLPack 0.x (dmlc/dlpack), for one array of bytes in host memory.
struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* manager;
  void (*deleter)(DLManagedTensor*);
};

constexpr int kDLCPU = 1;
constexpr int kDLUInt = 1;

// A lease as Python holds it. Views keep the memory mapped, also after release().
struct Slot {
  explicit Slot(std::shared_ptr<Lease> held)
      : arena(held->arena()),
        address(held->address()),
        offset(held->offset()),
        nbytes(held->nbytes()),
        lease(std::move(held)) {}

  const std::shared_ptr<Lease>& live() const {
    arena->owner().require("this Slot");
    if (!lease) fail_pinned("the slot was released");
    return lease;
  }

  std::shared_ptr<Arena> arena;
  char* address;
  size_t offset;
  size_t nbytes;
  std::shared_ptr<Lease> lease;
};

struct DLPackHolder {
  DLManagedTensor managed;
  int64_t shape;
  std::shared_ptr<Slot> slot;
};

py::capsule to_dlpack(const std::shared_ptr<Slot>& slot, const py::object& device, const py::object& copy) {
  slot->live();
  if (!copy.is_none() && py::bool_(copy)) throw py::buffer_error("a Slot is shared, never copied: copy the tensor");
  if (!device.is_none() && !device.equal(py::make_tuple(kDLCPU, 0))) {
    throw py::buffer_error("a Slot lies in host memory: move the tensor");
  }
  auto* holder = new DLPackHolder{{}, static_cast<int64_t>(slot->nbytes), slot};
  holder->managed.tensor = {slot->address, kDLCPU, 0, 1, kDLUInt, 8, 1, &holder->shape, nullptr, 0};
  holder->managed.manager = holder;
  holder->managed.deleter = [](DLManagedTensor* managed) { delete static_cast<DLPackHolder*>(managed->manager); };
  return py::capsule(&holder->managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // taken over by its consumer
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

// In a fork the locks of a request may be held by threads that do not exist there: it is never destroyed.
struct RequestHandle {
  explicit RequestHandle(std::shared_ptr<Request> held) : request(std::move(held)) {}
  ~RequestHandle() {
    if (!owner.is_current()) new std::shared_ptr<Request>(std::move(request));
  }
  Request& live() const {
    owner.require("this Request");
    return *request;
  }
  Process owner;
  std::shared_ptr<Request> request;
};

// Lets Ctrl-C and other signals interrupt a wait.
Request::Interrupt check_signals(GilReleased& released) {
  return [&released] {
    released.acquire();
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    released.release();
  };
}

struct DeleteWithoutGil {
  void operator()(Reader* reader) const {
    const GilReleased released;  // it drains what is in flight
    delete reader;
  }
};

// Paths and what names them, which need not be UTF-8.
py::str to_str(const std::string& text) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeFSDefaultAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
}

void raise_in_python(const Failure& failure) {
  const py::module_ errors = py::module_::import("mhaffn.errors");
  switch (failure.kind) {
    case ErrorKind::kUnavailable:
      return py::set_error(errors.attr("EngineUnavailableError"), to_str(failure.message));
    case ErrorKind::kPinned:
      return py::set_error(errors.attr("PinnedMemoryError"), to_str(failure.message));
    default:
      break;
  }
  const char* name = failure.kind == ErrorKind::kTruncated   ? "TruncatedFileError"
                     : failure.kind == ErrorKind::kTimeout   ? "ReadTimeoutError"
                     : failure.kind == ErrorKind::kCancelled ? "ReadCancelledError"
                                                             : "ReadError";
  const py::object type = errors.attr(name);
  const py::object error =
      type(to_str(failure.message), py::arg("op") = failure.op, py::arg("path") = to_str(failure.path),
           py::arg("offset") = failure.offset, py::arg("length") = failure.length, py::arg("errno") = failure.error);
  PyErr_SetObject(type.ptr(), error.ptr());
}

template <typename Enum>
Enum choose(const std::string& value, std::initializer_list<std::pair<const char*, Enum>> choices, const char* what) {
  std::string known;
  for (const auto& [name, choice] : choices) {
    if (value == name) return choice;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  throw std::invalid_argument(std::string(what) + ": got \"" + value + "\", expected one of " + known);
}

std::vector<Extent> to_extents(const std::vector<std::tuple<std::string, uint64_t, uint64_t>>& items) {
  std::vector<Extent> extents;
  extents.reserve(items.size());
  for (const auto& [path, offset, length] : items) extents.push_back({path, offset, length});
  return extents;
}

py::dict to_dict(const ArenaInfo& info) {
  py::dict result;
  result["nbytes"] = info.nbytes;
  result["leased_bytes"] = info.leased_bytes;
  result["peak_leased_bytes"] = info.peak_leased_bytes;
  result["leaked_bytes"] = info.leaked_bytes;
  result["huge_page_share"] = info.huge_page_share;
  result["prefaulted"] = info.prefaulted;
  result["prefault_s"] = info.prefault_s;
  result["cuda_registered"] = info.cuda_registered;
  result["cuda_reason"] = info.cuda_reason;
  result["register_s"] = info.register_s;
  result["numa_node"] = info.numa_node < 0 ? py::object(py::none()) : py::object(py::int_(info.numa_node));
  return result;
}

py::dict to_dict(const DeviceInfo& info) {
  py::dict result;
  result["device"] = info.device;
  result["engine"] = info.engine;
  result["direct"] = info.direct;
  result["registered_buffers"] = info.registered_buffers;
  result["registered_files"] = info.registered_files;
  result["detail"] = to_str(info.detail);
  result["bytes_read"] = info.bytes_read;
  result["busy_s"] = info.busy_s;
  result["retries"] = info.retries;
  return result;
}

py::dict to_dict(const ReaderInfo& info) {
  py::list devices;
  for (const DeviceInfo& device : info.devices) devices.append(to_dict(device));
  py::tuple reasons(info.reasons.size());
  for (size_t i = 0; i < info.reasons.size(); ++i) reasons[i] = to_str(info.reasons[i]);
  py::dict result;
  result["engine"] = info.engine;
  result["direct"] = info.direct;
  result["registered_buffers"] = info.registered_buffers;
  result["reasons"] = reasons;
  result["devices"] = devices;
  result["bytes_read"] = info.bytes_read;
  result["busy_s"] = info.busy_s;
  result["leaked_bytes"] = info.leaked_bytes;
  result["liburing"] = info.liburing;
  return result;
}

std::shared_ptr<Arena> make_arena(size_t nbytes, const std::string& cuda, bool prefault, std::optional<int> numa_node) {
  ArenaOptions options;
  options.nbytes = nbytes;
  options.cuda =
      choose<UseCuda>(cuda, {{"auto", UseCuda::kAuto}, {"yes", UseCuda::kYes}, {"no", UseCuda::kNo}}, "cuda");
  options.prefault = prefault;
  options.numa_node = numa_node.value_or(kNearGpu);
  const GilReleased released;
  return Arena::create(options);
}

std::unique_ptr<Reader, DeleteWithoutGil> make_reader(const std::string& engine, const std::string& direct, bool strict,
                                                      int64_t block_bytes, int64_t depth,
                                                      std::shared_ptr<Arena> arena) {
  ReaderOptions options;
  options.engine = choose<EngineKind>(
      engine, {{"auto", EngineKind::kAuto}, {"io_uring", EngineKind::kUring}, {"threads", EngineKind::kThreads}},
      "engine");
  options.direct =
      choose<Direct>(direct, {{"auto", Direct::kAuto}, {"on", Direct::kOn}, {"off", Direct::kOff}}, "direct");
  options.strict = strict;
  options.block_bytes = block_bytes;
  options.depth = depth;
  return std::unique_ptr<Reader, DeleteWithoutGil>(new Reader(options, std::move(arena)));
}

void bind_memory(py::module_& module) {
  py::class_<Slot, std::shared_ptr<Slot>>(module, "Slot", py::buffer_protocol(),
                                          R"(A lease of a PinnedArena: writable bytes, as a buffer and through DLPack.

Made by PinnedArena.lease(). It ends with release(), the end of a ``with`` block, or its last reference; views of
it stay mapped, but their bytes may then belong to another lease. The memory is not leased again before a request
that reads into it is over.)")
      .def_property_readonly(
          "nbytes", [](const Slot& slot) { return slot.nbytes; }, "Bytes leased.")
      .def_property_readonly(
          "offset", [](const Slot& slot) { return slot.offset; }, "Where it starts in its arena.")
      .def_property_readonly(
          "address", [](const Slot& slot) { return reinterpret_cast<uintptr_t>(slot.address); }, "Its host address.")
      .def_property_readonly(
          "released", [](const Slot& slot) { return !slot.lease; }, "True after release().")
      .def(
          "release", [](Slot& slot) { slot.lease.reset(); }, "Ends the lease; may be called more than once.")
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](Slot& slot, const py::args&) { slot.lease.reset(); })
      .def("__len__", [](const Slot& slot) { return slot.nbytes; })
      .def(
          "__dlpack__",
          [](const std::shared_ptr<Slot>& slot, const py::object&, const py::object&, const py::object& dl_device,
             const py::object& copy) { return to_dlpack(slot, dl_device, copy); },
          py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
          py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__", [](const Slot&) { return py::make_tuple(kDLCPU, 0); })
      .def_buffer([](Slot& slot) {
        slot.live();
        return py::buffer_info(slot.address, 1, "B", 1, {slot.nbytes}, {size_t{1}});
      });

  py::class_<Arena, std::shared_ptr<Arena>>(module, "Arena")
      .def(py::init(&make_arena), py::arg("nbytes"), py::arg("cuda"), py::arg("prefault"), py::arg("numa_node"))
      .def_property_readonly("nbytes", &Arena::nbytes)
      .def("lease", [](Arena& arena, size_t nbytes,
                       std::optional<size_t> offset) { return std::make_shared<Slot>(arena.lease(nbytes, offset)); })
      .def("info", [](const Arena& arena) { return to_dict(arena.info()); })
      .def("close", &Arena::close);
}

void bind_reading(py::module_& module) {
  py::class_<RequestHandle>(module, "Request", "Extents on their way into a slot. Made by Reader.submit().")
      .def_property_readonly(
          "placements",
          [](const RequestHandle& self) {
            const auto& offsets = self.request->layout().placements;
            py::tuple result(offsets.size());
            for (size_t i = 0; i < offsets.size(); ++i) result[i] = offsets[i] + self.request->slot_offset();
            return result;
          },
          "Where in the slot each extent's bytes lie, in the order given to submit().")
      .def_property_readonly(
          "nbytes", [](const RequestHandle& self) { return self.request->layout().extent_bytes; },
          "Bytes of the extents asked for.")
      .def_property_readonly(
          "cover_bytes", [](const RequestHandle& self) { return self.request->layout().cover_bytes; },
          "Bytes of the slot that the request uses, from its slot_offset.")
      .def_property_readonly(
          "ready_bytes", [](const RequestHandle& self) { return self.live().ready_bytes(); },
          "Bytes from slot_offset on that have arrived and will not be written again.")
      .def_property_readonly(
          "done", [](const RequestHandle& self) { return self.live().done(); },
          "True when it is over, with all bytes or with an error.")
      .def_property_readonly(
          "started_s", [](const RequestHandle& self) { return self.live().started_s(); },
          "When the first read was started, on the clock of time.perf_counter(); 0.0 before.")
      .def_property_readonly(
          "finished_s", [](const RequestHandle& self) { return self.live().finished_s(); },
          "When the last read was over, on the same clock; 0.0 before.")
      .def(
          "wait",
          [](RequestHandle& self, std::optional<double> timeout) {
            GilReleased released;
            self.request->wait(timeout, check_signals(released));
          },
          py::arg("timeout") = py::none(),
          R"(Waits until it is over, without the GIL; Ctrl-C ends the wait.

``timeout`` is in seconds; None stands for 60 s in which nothing arrives. Raises the read's ReadError, or
ReadTimeoutError: then the request goes on.)")
      .def(
          "wait_ready",
          [](RequestHandle& self, uint64_t nbytes, std::optional<double> timeout) {
            GilReleased released;
            return self.request->wait_ready(nbytes, timeout, check_signals(released));
          },
          py::arg("nbytes"), py::arg("timeout") = py::none(),
          "Waits until ready_bytes reaches ``nbytes``, or the request is over; returns ready_bytes. Raises as wait().")
      .def(
          "cancel",
          [](RequestHandle& self) {
            const GilReleased released;
            self.request->cancel();
          },
          "Ends the request early; wait() then raises ReadCancelledError once nothing writes to the slot any more.");

  py::class_<Reader, std::unique_ptr<Reader, DeleteWithoutGil>>(module, "Reader")
      .def(py::init(&make_reader), py::arg("engine"), py::arg("direct"), py::arg("strict"), py::arg("block_bytes"),
           py::arg("depth"), py::arg("arena"))
      .def("submit",
           [](Reader& reader, const std::vector<std::tuple<std::string, uint64_t, uint64_t>>& extents, const Slot& slot,
              uint64_t slot_offset) {
             return std::make_unique<RequestHandle>(reader.submit(to_extents(extents), slot.live(), slot_offset));
           })
      .def("info", [](const Reader& reader) { return to_dict(reader.info()); })
      .def("close", &Reader::close, py::call_guard<GilReleased>());

  module.def("cover_bytes", [](const std::vector<std::tuple<std::string, uint64_t, uint64_t>>& extents) {
    return lay_out(to_extents(extents)).cover_bytes;
  });
  module.attr("liburing") = Reader::liburing();
}

}  // namespace
}  // namespace mhaffn

PYBIND11_MODULE(_native, module) {
  module.doc() = "Pinned memory and the NVMe reader. Use mhaffn.reader, which is typed and documented.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const mhaffn::Error& error) {
      mhaffn::raise_in_python(error.failure());
    }
  });
  mhaffn::bind_memory(module);
  mhaffn::bind_reading(module);
}
