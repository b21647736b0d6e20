// Memory of `Rows`, quantized activations.
#pragma once

#include "core/kernels.h"
#include "core/memory.h"

namespace lacewing {

// Bytes that activations `[m, k]` need for a format.
size_t rows_bytes(const FormatInfo& format, int64_t m, int64_t k);

// Lays `Rows` out in `memory` (64-byte aligned, rows_bytes long).
Rows place_rows(const FormatInfo& format, int64_t m, int64_t k, uint8_t* memory);

}  // namespace lacewing
