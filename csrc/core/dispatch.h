// Which ISA's table runs on this CPU: CPUID, and what the OS saves (XCR0).
#pragma once

#include <string>

#include "core/kernels.h"

namespace lacewing {

// "`scalar`, `avx2`, .."
std::string isa_names();

// What a switch is on this CPU before anything is set.
int standard_of(const Switch& s);

// The table called `name`, or null if there is none.
const IsaStatus* find_isa(const std::string& name);

// The fastest usable table, or the one LACEWING_ISA names. Throws std::runtime_error that names
// the missing feature if that one cannot run here: never a silent fallback.
const KernelTable& default_table();

}  // namespace lacewing
