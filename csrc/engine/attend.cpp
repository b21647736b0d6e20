#include "engine/attend.h"

#include <algorithm>

namespace lacewing {
// ---- where things are

const KvHead& Attend::head_of(const LayerRows& at, int64_t kv_head) const {
  return cache_.layout().heads[static_cast<size_t>(at.first_head + kv_head)];
}
const KvKernels& Attend::kernels_of(const KvPlace& place) const {
  return table_.formats[cache_.format(place)];
}
const Tile& Attend::tile_of(const Item& item) const {
  return tiles_->tiles[static_cast<size_t>(item.tile)];
}
const int32_t* Attend::table_of(const KvPlace& place, int64_t sequence) const {
  return place ? step_.table(place.store, sequence) : nullptr;
}
// The block with a position of a sequence.
uint8_t* Attend::block_of(const KvPlace& place, const CacheRow& row, int64_t tokens) const {
  const int32_t block = table_of(place, row.sequence)[row.position / tokens];
  return cache_.blocks(place) + block * cache_.block_bytes(place);
}

AttentionArgs Attend::args_of(const LayerRows& at, const Item& item) const {
  const Tile& tile = tile_of(item);
  const KvPlace& place = head_of(at, item.kv_head).growing;
  const int64_t column = item.kv_head * shape_.group_heads * shape_.head_dim;
  return {at.q + tile.row * at.q_stride + column,
          at.q_stride,
          cache_.blocks(place),
          table_of(place, tile.sequence),
          shape_.head_dim,
          shape_.group_heads,
          tile.rows,
          tile.position,
          at.window,
          at.scale,
          at.out + tile.row * at.out_stride + column,
          at.out_stride,
          kernel_};
}

// ---- keys and values

void Attend::store(const LayerRows& at, int64_t row, int64_t kv_head) {
  const KvHead& head = head_of(at, kv_head);
  const CacheRow& to = tiles_->rows[static_cast<size_t>(row)];
  const int64_t from = row * at.kv_stride + kv_head * shape_.head_dim;
  kernels_of(head.growing)
      .store(at.k + from, at.v + from, block_of(head.growing, to), to.position % kBlock,
             shape_.head_dim);
  if (!head.labels) return;
  const KvLayout& layout = cache_.layout();
  const int64_t first = (at.first_head + kv_head) * layout.channels;
  table_.store_label(at.k + from, layout.label_channels.data() + first,
                     layout.label_scales.data() + first, layout.channels,
                     block_of(head.labels, to, kLabelTokens), to.position % kLabelTokens);
}

// Seals the block that the row has filled.
void Attend::seal(const LayerRows& at, int64_t row, int64_t kv_head) {
  const KvHead& head = head_of(at, kv_head);
  const CacheRow& to = tiles_->rows[static_cast<size_t>(row)];
  if (head.sealed && to.position % kBlock == kBlock - 1)
    kernels_of(head.sealed)
        .seal(block_of(head.growing, to), block_of(head.sealed, to), shape_.head_dim);
}

// ---- attention

// Whether the item's tile and head are complete with it: the last of its parts merges them.
bool Attend::attend(const LayerRows& at, const Item& item) {
  const Tile& tile = tile_of(item);
  const KvHead& head = head_of(at, item.kv_head);
  const AttentionArgs args = args_of(at, item);
  if (head.labels) {
    if (item.first == 0) attend_chosen(at, item, args);
    return item.first == 0;
  }
  if (head.lists()) {
    const int32_t* sealed = table_of(head.sealed, tile.sequence);
    const int64_t last = tile.position / kBlock;
    if (!head.span.everything()) space_.reads.choose(head.span, last);
    const BlockLists lists = head.span.everything()
                                 ? all_blocks(head, last, sealed, args.block_table)
                                 : space_.reads.place(head, last, sealed, args.block_table);
    if (tile.parts > 1) return attend_part(head, args, lists, item);
    attend_lists(head, args, lists);
    return true;
  }
  const KvKernels& kernels = kernels_of(head.growing);
  if (tile.parts == 1) {
    kernels.attention(args);
    return true;
  }
  float* partials = partials_of(item);
  kernels.attend_segments(args, item.first, item.stop, partials);
  if (!last_part(item)) return false;
  kernels.merge_segments(args, partials);
  return true;
}

float* Attend::partials_of(const Item& item) const {
  const Tile& tile = tile_of(item);
  return partials_ + tile.partials + item.kv_head * tile.segments * partial_floats(shape_.head_dim);
}

bool Attend::last_part(const Item& item) {
  std::atomic<int64_t>& done =
      done_[static_cast<size_t>(item.tile * shape_.kv_heads + item.kv_head)];
  if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < tile_of(item).parts) return false;
  done.store(0, std::memory_order_relaxed);  // for the next layer
  return true;
}

// The arguments for the sealed and for the growing blocks.
Attend::Listed Attend::listed(const KvHead& head, const AttentionArgs& args,
                              const BlockLists& lists) const {
  Listed found{args, args, lists.sealed_count > 0};
  found.growing.block_table = lists.growing;
  found.growing.last = (lists.growing_count - 1) * kBlock + args.last % kBlock;
  if (found.any_sealed) {
    found.sealed.cache = cache_.blocks(head.sealed);
    found.sealed.block_table = lists.sealed;
    found.sealed.last = lists.sealed_count * kBlock - 1;
    found.sealed.causal = false;
  }
  return found;
}

// Rows of one query block against the blocks of the lists.
void Attend::attend_lists(const KvHead& head, const AttentionArgs& args, const BlockLists& lists) {
  Listed to = listed(head, args, lists);
  if (to.any_sealed) {
    const int64_t floats = whole_partial_floats(args.rows * args.group_heads, args.head_dim);
    space_.partial.reserve(static_cast<size_t>(floats) * sizeof(float));
    to.growing.earlier = space_.partial.as<float>();
    kernels_of(head.sealed).attend_partial(to.sealed, to.growing.earlier);
  }
  kernels_of(head.growing).attention(to.growing);
}

// As `attend_lists`, in parts: of the sealed blocks, if there are any, else of the growing ones.
bool Attend::attend_part(const KvHead& head, const AttentionArgs& args, const BlockLists& lists,
                         const Item& item) {
  Listed to = listed(head, args, lists);
  const AttentionArgs& main = to.any_sealed ? to.sealed : to.growing;
  const KvKernels& kernels = kernels_of(to.any_sealed ? head.sealed : head.growing);
  const int64_t segments = main.last / kSegment + 1;
  float* partials = partials_of(item);
  if (item.first < segments)
    kernels.attend_segments(main, item.first, std::min(item.stop, segments), partials);
  if (!last_part(item)) return false;
  if (!to.any_sealed) {
    kernels.merge_segments(main, partials);
    return true;
  }
  kernels.join_segments(main, partials);
  to.growing.earlier = partials;
  kernels_of(head.growing).attention(to.growing);
  return true;
}

// Every row against the blocks that its labels choose.
void Attend::attend_chosen(const LayerRows& at, const Item& item, AttentionArgs args) {
  const Tile& tile = tile_of(item);
  const KvHead& head = head_of(at, item.kv_head);
  const KvLayout& layout = cache_.layout();
  const int64_t first = (at.first_head + item.kv_head) * layout.channels;
  const int32_t* sealed = table_of(head.sealed, tile.sequence);
  std::vector<int32_t>& blocks = space_.reads.blocks;
  args.rows = 1;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t count = args.last / kBlock + 1, budget = topk_budget(count, layout.topk);
    blocks.resize(static_cast<size_t>(std::min(count, budget)));
    space_.select.reserve(select_scratch(args.group_heads, count));
    table_.select({args.q, args.head_dim, args.group_heads, args.scale, cache_.blocks(head.labels),
                   table_of(head.labels, tile.sequence), layout.label_channels.data() + first,
                   layout.label_scales.data() + first, layout.channels, args.last, kTopkSinks,
                   kTopkRecent, budget, blocks.data(), space_.select.data()});
    attend_lists(head, args, space_.reads.place(head, count - 1, sealed, args.block_table));
    args.q += args.q_stride;
    args.out += args.out_stride;
    ++args.last;
  }
}

// ---- merging

void Attend::merge(const LayerRows& at, const Merge& merge, int64_t kv_head) {
  const KvPlace& place = head_of(at, kv_head).growing;
  uint8_t* blocks = cache_.blocks(place);
  const int64_t column = kv_head * shape_.group_heads * shape_.head_dim;
  kernels_of(place).merge({at.q + merge.row * at.q_stride + column, at.q_stride, kMergeRows,
                           shape_.head_dim, shape_.group_heads, at.scale, blocks,
                           table_of(place, merge.sequence), merge.tokens, blocks,
                           step_.merged_table(merge.sequence), merge.keep, space_.merge.data()});
}

}  // namespace lacewing
