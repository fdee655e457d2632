// The kernels of one instruction set: what the file that includes this one calls `Isa`.
#pragma once

#include "attention/backward_kernel.inc.hpp"
#include "attention/forward_kernel.inc.hpp"
#include "clustering/products_kernel.inc.hpp"
#include "layers/layers_kernel.inc.hpp"
#include "nll/linear_nll_kernel.inc.hpp"
#include "nll/loss_slope_kernel.inc.hpp"

namespace codeact {
namespace {

constexpr Kernels kKernels = {.tile_rows = kRows,
                              .panel_columns = kColumns,
                              .value_columns = kValueVectors * kLanes,
                              .lanes = kLanes,
                              .pairs = Isa::kPairs,
                              .gradient_queries = kGradientQueries,
                              .pack_row = pack_row,
                              .pack_panel = pack_panel,
                              .accumulate = accumulate,
                              .add_lanes = add_lanes,
                              .total_row = total_row,
                              .slope_row = slope_row,
                              .store_row = store_elements,
                              .multiply_rows = multiply_rows,
                              .normalize_row = normalize_row,
                              .gate_row = gate_row,
                              .rotate_row = rotate_row,
                              .attend = attend,
                              .attend_backward = attend_backward};

}  // namespace
}  // namespace codeact
