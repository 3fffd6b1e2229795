// Stands for int8_products.h where VPDPBUSD is not there: no segment is multiplied in int8. Include products.h first.
#pragma once

#include "cpu/kernels.h"

namespace {

struct Int8Operand {};

inline bool in_int8(const flex::Segment&) { return false; }
inline Int8Operand operand_of(const flex::Segment&, int64_t) { return {}; }
inline Int8Operand dy_operand_of(const flex::Segment&, int64_t) { return {}; }

struct NoScales {};

template <class E>
struct RowScales {
  Weight<E> weight;
};

template <class E>
Weight<E> with_inverses(const Weight<E>& weight, const flex::Segment&) { return weight; }

template <class WeightOf, class RowsOf, class ColumnsOf>
void find_all_inverses(const flex::Segment*, int64_t, WeightOf, RowsOf, ColumnsOf) {}

template <class E, class OperandOf, class RowOf, class MultiplierOf>
void quantize_operands(const flex::Segment*, int64_t, OperandOf, RowOf, MultiplierOf) {}

template <class E>
void int8_rows_product(const Int8Operand&, int64_t, int64_t, const Weight<E>&, int64_t, float*, int64_t,
                       const Workspace&, const Area&) {}

template <class E>
void int8_columns_product(const Int8Operand&, int64_t, int64_t, const Weight<E>&, int64_t, float*, int64_t,
                          const Workspace&, const Area&) {}

}  // namespace
