#include "engine/reads.h"

#include <algorithm>

namespace lacewing {

BlockLists all_blocks(const KvHead& head, int64_t i, const int32_t* sealed_table,
                      const int32_t* growing_table) {
  const int64_t sealed = head.sealed ? std::max<int64_t>(0, i + 1 - kRecent) : 0;
  return {sealed_table, sealed, growing_table + sealed, i + 1 - sealed};
}

void Reads::choose(const KvSpan& span, int64_t i) {
  blocks.clear();
  for (int64_t j = 0; j <= i; ++j)
    if (span.reads(i, j)) blocks.push_back(static_cast<int32_t>(j));
}

BlockLists Reads::place(const KvHead& head, int64_t i, const int32_t* sealed_table,
                        const int32_t* growing_table) {
  sealed_.clear();
  growing_.clear();
  for (const int32_t j : blocks) {
    if (head.sealed && i - j >= kRecent)
      sealed_.push_back(sealed_table[j]);
    else
      growing_.push_back(growing_table[j]);
  }
  return {sealed_.data(), static_cast<int64_t>(sealed_.size()), growing_.data(),
          static_cast<int64_t>(growing_.size())};
}

}  // namespace lacewing
