// Python module flex_kernels._cuda_ops: the launchers of launchers.h with pointers and the stream as integers.
// Compiled by the host compiler alone: no CUDA and no torch header.

#include <pybind11/pybind11.h>

#include <utility>

#include "launchers.h"

#ifndef FLEX_DEVICE_TYPE
#define FLEX_DEVICE_TYPE "cuda"
#endif

namespace {

namespace py = pybind11;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

flex::Routing routing(int experts, int top_k, int gates, bool normalize, bool sigmoid, float scale) {
  return {experts, top_k, gates, normalize, sigmoid, scale};
}

flex::RoutingOutput routing_output(uintptr_t ids, uintptr_t weights, uintptr_t gates, uintptr_t logits,
                                   uintptr_t histogram) {
  return {pointer<int32_t>(ids), pointer<float>(weights), pointer<float>(gates), pointer<float>(logits),
          pointer<int32_t>(histogram)};
}

int route(int device, uintptr_t stream, uintptr_t logits_TR, int64_t stride, int parts, int gate_parts, float part_scale,
          uintptr_t bias_E, uintptr_t gate_bias_G, int64_t tokens, flex::Routing settings, flex::RoutingOutput output) {
  return flex::launch_route(device, pointer<void>(stream),
                            {pointer<const float>(logits_TR), stride, parts, gate_parts, part_scale},
                            pointer<const float>(bias_E), pointer<const float>(gate_bias_G), tokens, settings, output);
}

int route_fused(int device, uintptr_t stream, uintptr_t x_TH, int x_dtype, uintptr_t weight_EH, int weight_dtype,
                uintptr_t bias_E, uintptr_t gate_weight_GH, uintptr_t gate_bias_G, int64_t tokens, int hidden,
                flex::Routing settings, flex::RoutingOutput output) {
  return flex::launch_route_fused(device, pointer<void>(stream), pointer<const void>(x_TH), x_dtype,
                                  pointer<const void>(weight_EH), weight_dtype, pointer<const float>(bias_E),
                                  pointer<const float>(gate_weight_GH), pointer<const float>(gate_bias_G), tokens,
                                  hidden, settings, output);
}

int split_rows(int device, uintptr_t stream, uintptr_t weight_EH, int weight_dtype, uintptr_t gate_weight_GH,
               uintptr_t rows_RH, int dtype, int experts, int gates, int hidden, int rows, float part_scale) {
  return flex::launch_split_rows(device, pointer<void>(stream), pointer<const void>(weight_EH), weight_dtype,
                                 pointer<const float>(gate_weight_GH), pointer<void>(rows_RH), dtype, experts, gates,
                                 hidden, rows, part_scale);
}

int permute(int device, uintptr_t stream, uintptr_t ids_N, int64_t slots, int experts, uintptr_t counts_CE1,
            uintptr_t offsets_E1, uintptr_t order_N, uintptr_t inverse_N, uintptr_t tile_expert, uintptr_t tile_row,
            uintptr_t tile_count, int tile_bound, int block_rows) {
  return flex::launch_permute(device, pointer<void>(stream), pointer<const int32_t>(ids_N), slots, experts,
                              pointer<int32_t>(counts_CE1),
                              {pointer<int32_t>(offsets_E1), pointer<int32_t>(order_N), pointer<int32_t>(inverse_N),
                               pointer<int32_t>(tile_expert), pointer<int32_t>(tile_row), pointer<int32_t>(tile_count),
                               tile_bound, block_rows});
}

int combine(int device, uintptr_t stream, uintptr_t rows_NH, uintptr_t inverse_N, uintptr_t weights_TK,
            uintptr_t personal_TH, uintptr_t gate_T, uintptr_t shared_TH, uintptr_t shared_gate_T, uintptr_t y_TH,
            int64_t tokens, int hidden, int top_k, bool convex, int dtype) {
  return flex::launch_combine(
      device, pointer<void>(stream),
      {pointer<const void>(rows_NH), pointer<const int32_t>(inverse_N), pointer<const float>(weights_TK),
       pointer<const void>(personal_TH), pointer<const float>(gate_T), pointer<const void>(shared_TH),
       pointer<const float>(shared_gate_T), pointer<void>(y_TH), tokens, hidden, top_k, convex},
      dtype);
}

std::pair<int, int> device_count() {
  int count = 0;
  const int error = flex::device_count(&count);
  return {error, count};
}

}  // namespace

PYBIND11_MODULE(_cuda_ops, m) {
  m.doc() = "CUDA kernels of flex_kernels. Each launcher returns 0 or a CUDA error code; see error_string.";
  m.attr("DEVICE_TYPE") = FLEX_DEVICE_TYPE;
  m.attr("FLOAT32") = static_cast<int>(flex::kFloat32);
  m.attr("BFLOAT16") = static_cast<int>(flex::kBFloat16);
  m.attr("FLOAT16") = static_cast<int>(flex::kFloat16);
  m.attr("MAX_EXPERTS") = flex::kMaxExperts;
  m.attr("MAX_TOP_K") = flex::kMaxTopK;
  // Local, so that this module and its build for the host can live in one process.
  py::class_<flex::Routing>(m, "Routing", py::module_local()).def(py::init(&routing));
  py::class_<flex::RoutingOutput>(m, "RoutingOutput", py::module_local()).def(py::init(&routing_output));
  m.def("route", &route);
  m.def("route_fused", &route_fused);
  m.def("split_rows", &split_rows);
  m.def("permute_chunks", &flex::permute_chunks);
  m.def("permute", &permute);
  m.def("combine", &combine);
  m.def("error_string", &flex::error_string);
  m.def("device_count", &device_count, "(error code, number of devices) as the CUDA runtime answers");
}
