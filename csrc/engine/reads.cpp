#include "engine/reads.h"

namespace lacewing {

void Reads::choose(const KvSpan& span, int64_t i) {
  blocks.clear();
  for (int64_t j = 0; j <= i; ++j)
    if (span.reads(i, j)) blocks.push_back(static_cast<int32_t>(j));
}

void Reads::place(const KvHead& head, int64_t i, const int32_t* sealed_table,
                  const int32_t* growing_table) {
  sealed.clear();
  growing.clear();
  for (const int32_t j : blocks) {
    if (head.sealed && i - j >= kRecent)
      sealed.push_back(sealed_table[j]);
    else
      growing.push_back(growing_table[j]);
  }
}

}  // namespace lacewing
