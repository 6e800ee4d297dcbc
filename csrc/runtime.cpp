// The Python module pygen._runtime: build facts and thread control. It holds no tensors and links to no PyTorch; it
// finds the operator library that Python has already loaded.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

class OperatorLibrary {
 public:
  void attach(const std::string& path) {
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (!handle_) throw std::runtime_error(path + " is not loaded: load it with torch.ops.load_library first");
  }

  template <class Function>
  Function* find(const char* name) const {
    if (!handle_) throw std::runtime_error("the CPU operator library is not loaded, so it has no threads to control");
    auto* function = reinterpret_cast<Function*>(dlsym(handle_, name));
    if (!function) throw std::runtime_error(std::string("the operator library has no function ") + name);
    return function;
  }

 private:
  void* handle_ = nullptr;
};

OperatorLibrary& operators() {
  static OperatorLibrary library;
  return library;
}

py::dict build_facts() {
  py::dict facts;
  facts["torch"] = PYGEN_TORCH_VERSION;
  facts["cuda"] = PYGEN_CUDA_VERSION;
  facts["cuda_architectures"] = PYGEN_CUDA_ARCHITECTURES;
  facts["cuda_absent"] = PYGEN_CUDA_ABSENT;
  facts["build_type"] = PYGEN_BUILD_TYPE;
  facts["compiler"] = __VERSION__;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_runtime, module) {
  module.doc() = "Build facts and thread control of pygen's operator libraries.";
  module.def("build_facts", &build_facts,
             "What the libraries were built with, as strings; empty where it does not apply.");
  module.def(
      "attach", [](const std::string& path) { operators().attach(path); }, py::arg("path"),
      "Find the CPU operator library, already loaded from `path`.");
  module.def(
      "set_num_threads",
      [](int64_t n) {
        if (n < 0) throw py::value_error("n is " + std::to_string(n) + ", but expected 0 (no limit) or more");
        operators().find<void(int64_t)>("pygen_set_num_threads")(n);
      },
      py::arg("n"), "Limit pygen's CPU operators to n threads; 0 leaves PyTorch's own limit.");
  module.def(
      "get_num_threads", [] { return operators().find<int64_t()>("pygen_get_num_threads")(); },
      "How many threads pygen's CPU operators may use.");
  module.def(
      "instruction_set", [] { return std::string(operators().find<const char*()>("pygen_instruction_set")()); },
      "The instruction set of the row functions in use.");
}
