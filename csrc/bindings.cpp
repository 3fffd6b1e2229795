// Python's view of the CPU kernels: module flex_kernels._cpu_ops.
//
// Tensors arrive as addresses and sizes, checked by flex_kernels/cpu/native.py, so that one binary serves every torch
// version. The interpreter's lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "cpu/table.h"

namespace py = pybind11;

namespace {

using flex::kernels;
using flex::Segment;
using Address = uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) { return reinterpret_cast<T*>(address); }

void set_isa(const std::string& name) {
  if (!flex::use_kernels(name.c_str()))
    throw std::invalid_argument("isa='" + name + "' is not one that this processor and build can run");
}

int64_t scratch_bytes(int64_t longest, int64_t rows) {
  const int64_t usual = flex::bytes_a_thread(longest, rows);
  const int64_t own = kernels().own_bytes_a_thread ? kernels().own_bytes_a_thread(longest, rows) : 0;
  return own < usual ? usual : own;
}

void need_fused() {
  if (!kernels().fused) throw std::runtime_error(std::string("the ") + kernels().name + " kernels are not fused");
}

}  // namespace

PYBIND11_MODULE(_cpu_ops, m) {
  m.doc() = "CPU kernels of flex_kernels; called through flex_kernels.cpu.native.";

  m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
  m.def("fused", [] { return kernels().fused; }, "Whether the fused feed-forward kernels exist for it.");
  m.def("multiplies_int8", [] { return kernels().int8; }, "Whether these multiply int8 with int8 where they may.");
  m.def("set_isa", &set_isa,
        "Use 'amx', 'avx512', 'avx2', 'generic', or 'auto' for the best; ValueError if it cannot run.");
  m.def("isas", [] {
    py::list names;
    for (const flex::Kernels* k : {flex::amx_kernels(), flex::avx512_kernels(), flex::avx2_kernels(), flex::generic_kernels()})
      if (k) names.append(k->name);
    return names;
  }, "The instruction sets that can run here, best first.");
  m.attr("SEGMENT_WORDS") = sizeof(Segment) / sizeof(int64_t);
  m.attr("BLOCK_WORDS") = sizeof(flex::SegmentBlock) / sizeof(int64_t);
  m.attr("PIECE_WORDS") = sizeof(flex::Piece) / sizeof(int64_t);
  m.attr("NF4_LEVELS") = std::vector<float>(flex::kNf4Levels, flex::kNf4Levels + 16);
  m.attr("GROUP_COLUMNS") = flex::kGroupColumns;
  m.attr("PARTIAL_COLUMNS") = flex::kPartialColumns;
  m.attr("THIN_ROWS") = flex::kThinRows;
  m.attr("THIN_CODE_ROWS") = flex::kThinCodeRows;
  m.attr("BLOCK_ROWS") = flex::kBlockRows;
  m.attr("INT8_GROUP") = flex::kInt8Group;
  m.attr("INT8_UNIT") = flex::kInt8Unit;
  m.attr("FEW_ROWS") = flex::kFewRows;
  m.attr("HIDDEN_UNIT") = flex::kHiddenUnit;
  m.def("scratch_bytes", &scratch_bytes);

  py::class_<flex::Pages>(m, "Pages", py::buffer_protocol(), "Bytes of a large buffer that comes and goes.")
      .def(py::init<int64_t>())
      .def_buffer([](flex::Pages& pages) {
        return py::buffer_info(static_cast<uint8_t*>(pages.data()), static_cast<py::ssize_t>(pages.bytes()));
      });
  m.def("give_back_pages", &flex::give_back_pages, Unlocked());
  m.attr("KEPT_BYTES") = flex::kKeptBytes;
  m.def("gather_rows", [](Address source, Address tokens, Address out, int64_t rows, int64_t bytes, int threads) {
    flex::gather_rows(at<void>(source), at<int32_t>(tokens), at<void>(out), rows, bytes, threads);
  }, Unlocked());
  m.def("sort_rows", [](Address ids, Address weights, Address closed, int64_t tokens, int64_t top_k, int64_t experts,
                        Address offsets, Address order, Address token, Address scale) {
    flex::sort_rows(at<int32_t>(ids), at<float>(weights), at<float>(closed), tokens, top_k, experts,
                    at<int32_t>(offsets), at<int32_t>(order), at<int32_t>(token), at<float>(scale));
  }, Unlocked());
  m.def("unsort_rows", [](Address values, Address order, int64_t used, int64_t slots, Address out) {
    flex::unsort_rows(at<float>(values), at<int32_t>(order), used, slots, at<float>(out));
  }, Unlocked());
  m.def("choose", [](Address logits, int64_t ld, Address bias, int64_t tokens, int64_t experts, int64_t top_k,
                     bool normalize, bool sigmoid, float scale, Address ids, Address weights, Address scratch,
                     int threads) {
    flex::choose(at<float>(logits), ld, at<float>(bias), tokens, experts, top_k, normalize, sigmoid, scale,
                 at<int32_t>(ids), at<float>(weights), at<float>(scratch), threads);
  }, Unlocked());
  m.def("open_gates", [](Address logits, int64_t ld, int64_t first, Address bias, int64_t tokens, int64_t count,
                         Address gates, int threads) {
    flex::open_gates(at<float>(logits), ld, first, at<float>(bias), tokens, count, at<float>(gates), threads);
  }, Unlocked());
  m.def("choose_backward", [](Address logits, int64_t ld, Address ids, Address grad_weights, Address added,
                              int64_t tokens, int64_t experts, int64_t top_k, bool normalize, bool sigmoid,
                              float scale, Address scratch, int threads) {
    flex::choose_backward(at<float>(logits), ld, at<int32_t>(ids), at<float>(grad_weights), at<float>(added), tokens,
                          experts, top_k, normalize, sigmoid, scale, at<float>(scratch), threads);
  }, Unlocked());
  m.def("open_gates_backward", [](Address gates, Address grad_gates, int64_t tokens, int64_t count, Address out,
                                  int64_t ld, Address totals) {
    flex::open_gates_backward(at<float>(gates), at<float>(grad_gates), tokens, count, at<float>(out), ld,
                              at<float>(totals));
  }, Unlocked());

  m.def("router_product", [](int dtype, Address x, int64_t tokens, int64_t hidden, int router_dtype, Address router,
                             int64_t experts, Address gate_rows, int64_t gates, Address out, int threads) {
    need_fused();
    const flex::RouterRows rows{router_dtype, at<void>(router), experts, at<float>(gate_rows), gates};
    kernels().router_product(dtype, at<void>(x), tokens, hidden, rows, at<float>(out), threads);
  }, Unlocked());
  m.def("router_input_gradient", [](int dtype, Address d, int64_t tokens, int64_t hidden, int router_dtype,
                                    Address router, int64_t experts, Address gate_rows, int64_t gates, Address other,
                                    Address dx, int threads) {
    need_fused();
    const flex::RouterRows rows{router_dtype, at<void>(router), experts, at<float>(gate_rows), gates};
    kernels().router_input_gradient(dtype, at<float>(d), tokens, hidden, rows, at<void>(other), at<void>(dx), threads);
  }, Unlocked());
  m.def("router_rows_gradient", [](int dtype, Address d, int64_t ldd, Address x, int64_t tokens, int64_t hidden,
                                   int64_t count, Address out, int threads) {
    need_fused();
    kernels().router_rows_gradient(dtype, at<float>(d), ldd, at<void>(x), tokens, hidden, count, at<float>(out),
                                   threads);
  }, Unlocked());

  m.def("swiglu", [](int dtype, Address z, Address a, int64_t rows, int64_t width, int threads) {
    kernels().swiglu(dtype, at<void>(z), at<void>(a), rows, width, threads);
  }, Unlocked());
  m.def("swiglu_backward", [](int dtype, Address z, Address da, Address scale, Address dz, Address dscale,
                              Address scaled, int64_t rows, int64_t width, int threads) {
    kernels().swiglu_backward(dtype, at<void>(z), at<void>(da), at<float>(scale), at<void>(dz), at<float>(dscale),
                              at<void>(scaled), rows, width, threads);
  }, Unlocked());
  m.def("scatter_add", [](int dtype, Address source, Address tokens, Address scale, Address out, int64_t rows,
                          int64_t columns, int threads) {
    kernels().scatter_add(dtype, at<void>(source), at<int32_t>(tokens), at<float>(scale), at<float>(out), rows,
                          columns, threads);
  }, Unlocked());

  m.def("lay_out_segments", [](Address blocks, Address pieces, int64_t count, Address out) {
    flex::lay_out_segments(at<flex::SegmentBlock>(blocks), at<flex::Piece>(pieces), count, at<Segment>(out));
  });
  m.def("up", [](int dtype, Address x, int64_t hidden, Address segments, int64_t count, Address scratch,
                 int64_t bytes, int threads) {
    need_fused();
    kernels().up(dtype, at<void>(x), hidden, at<Segment>(segments), count, at<void>(scratch), bytes, threads);
  }, Unlocked());
  m.def("down", [](int dtype, Address segments, int64_t count, int64_t hidden, Address out, Address scratch,
                   int64_t bytes, int threads) {
    need_fused();
    kernels().down(dtype, at<Segment>(segments), count, hidden, at<float>(out), at<void>(scratch), bytes, threads);
  }, Unlocked());
  m.def("up_backward", [](int dtype, Address x, Address dy, int64_t hidden, Address segments, int64_t count,
                          Address partial, Address scratch, int64_t bytes, int threads) {
    need_fused();
    kernels().up_backward(dtype, at<void>(x), at<void>(dy), hidden, at<Segment>(segments), count, at<float>(partial),
                          at<void>(scratch), bytes, threads);
  }, Unlocked());
  m.def("down_backward", [](int dtype, Address segments, int64_t count, int64_t hidden, Address dx, Address scratch,
                            int64_t bytes, int threads) {
    need_fused();
    kernels().down_backward(dtype, at<Segment>(segments), count, hidden, at<float>(dx), at<void>(scratch), bytes,
                            threads);
  }, Unlocked());
  m.def("has_weight_gradient", [] { return kernels().weight_gradient != nullptr; });
  m.def("weight_gradient", [](int dtype, Address left, Address right, int64_t rows, int64_t height, int64_t width,
                              Address out, bool accumulate, Address scratch, int64_t bytes, int threads) {
    if (!kernels().weight_gradient) throw std::runtime_error(std::string(kernels().name) + " has no weight_gradient");
    kernels().weight_gradient(dtype, at<void>(left), at<void>(right), rows, height, width, at<float>(out), accumulate,
                              at<void>(scratch), bytes, threads);
  }, Unlocked());
}
