// The Python module pygen._runtime: build facts, thread control and the page table of paged caches. It holds no tensors
// and links to no PyTorch; it finds the operator library that Python has already loaded.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "page_table.h"

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

// int32 (sequences, columns), each sequence's pages and -1 behind them.
py::bytes table(const pygen::PageTable& pages, const std::vector<int64_t>& sequences, int64_t columns) {
  std::vector<int32_t> rows(sequences.size() * static_cast<size_t>(std::max<int64_t>(columns, 0)), -1);
  auto row = rows.begin();
  for (const int64_t sequence : sequences) {
    const std::vector<int32_t>& own = pages.pages_of(sequence);
    if (static_cast<int64_t>(own.size()) > columns) {
      throw py::value_error("columns is " + std::to_string(columns) + ", but sequence " + std::to_string(sequence) +
                            " has " + std::to_string(own.size()) + " pages");
    }
    std::copy(own.begin(), own.end(), row);
    row += columns;
  }
  return {reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(int32_t)};
}

void bind_page_table(py::module_& module) {
  using pygen::PageTable;
  py::class_<PageTable>(module, "PageTable",
                        "Which pages of a paged key/value cache hold which tokens of which sequence.")
      .def(py::init<int64_t, int64_t>(), py::arg("pages"), py::arg("page_size"))
      .def("add", &PageTable::add, py::arg("tokens") = PageTable::Tokens{},
           "A new sequence, on the whole pages of `tokens` that are there already: its number, and how many tokens "
           "those are.")
      .def(
          "append", &PageTable::append, py::arg("sequences"), py::arg("count"),
          py::arg("tokens") = std::vector<PageTable::Tokens>{},
          "Room for `count` more tokens of each sequence, all or nothing; the (from, to) pages to copy before they are "
          "written.")
      .def("written", &PageTable::written, py::arg("sequences"),
           "The caller has written all tokens of these sequences: their whole pages can be found by the ids from now "
           "on.")
      .def("fork", &PageTable::fork, py::arg("sequence"), py::arg("copies") = 1,
           "Further sequences with the same tokens, on the same pages.")
      .def("crop", &PageTable::crop, py::arg("sequence"), py::arg("length"), "Take back all tokens after `length`.")
      .def("free", &PageTable::free, py::arg("sequence"), "Give a sequence up, and its share of its pages.")
      .def("length", &PageTable::length, py::arg("sequence"), "How many tokens a sequence has.")
      .def("pages_of", &PageTable::pages_of, py::arg("sequence"), "The pages of a sequence, in order.")
      .def("references", &PageTable::references, py::arg("page"), "How many sequences hold a page.")
      .def("table", &table, py::arg("sequences"), py::arg("columns"),
           "The pages of sequences as the bytes of int32 (sequences, columns), with -1 behind the last.")
      .def_property_readonly("sequences", &PageTable::sequences)
      .def_property_readonly("page_size", &PageTable::page_size)
      .def_property_readonly("page_count", &PageTable::page_count)
      .def_property_readonly("free_pages", &PageTable::free_pages);
}

}  // namespace

PYBIND11_MODULE(_runtime, module) {
  module.doc() = "Build facts and thread control of pygen's operator libraries, and the page table of paged caches.";
  bind_page_table(module);
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
