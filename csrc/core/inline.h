// Code compiled with an ISA's flags must never become a weak symbol that other code may bind to.
#pragma once

#define LW_INLINE inline __attribute__((always_inline))
