#include "cpu/pages.h"

#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define FLEX_HAS_MMAP 1
#endif

namespace flex {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

struct Free {
  void* data;
  int64_t room;
};

// Never destroyed: a buffer may outlive the statics of this file when the process ends.
struct Kept {
  std::mutex lock;
  std::vector<Free> buffers;  // The longest unused first.
  int64_t bytes = 0;
};

Kept& kept() {
  static Kept* const one = new Kept;
  return *one;
}

// Whole huge pages, and few different sizes, so that a pass of somewhat fewer rows finds the pages of the last one.
int64_t rounded(int64_t bytes) {
  int64_t step = kHugePage;
  while (step * 16 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

#ifdef FLEX_HAS_MMAP

void drop(const Free& buffer) { munmap(buffer.data, static_cast<size_t>(buffer.room)); }

void* fresh(int64_t room) {
  // Of one huge page more, the whole huge pages within.
  const int64_t mapped = room + kHugePage;
  void* all = mmap(nullptr, static_cast<size_t>(mapped), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  char* const first = static_cast<char*>(all);
  const int64_t before = -reinterpret_cast<intptr_t>(all) & (kHugePage - 1);
  if (before) drop({first, before});
  drop({first + before + room, mapped - room - before});
#ifdef MADV_HUGEPAGE
  madvise(first + before, static_cast<size_t>(room), MADV_HUGEPAGE);
#endif
  return first + before;
}

#else

void drop(const Free& buffer) { ::operator delete(buffer.data); }

void* fresh(int64_t room) { return ::operator new(static_cast<size_t>(room)); }

#endif

}  // namespace

Pages::Pages(int64_t bytes) : data_(nullptr), bytes_(bytes), room_(rounded(bytes)) {
  if (bytes < 1) throw std::invalid_argument("bytes must be at least 1, got " + std::to_string(bytes));
  Kept& pool = kept();
  {
    const std::lock_guard<std::mutex> guard(pool.lock);
    auto best = pool.buffers.end();
    for (auto it = pool.buffers.begin(); it != pool.buffers.end(); ++it)
      if (it->room >= room_ && it->room <= 2 * room_ && (best == pool.buffers.end() || it->room < best->room))
        best = it;
    if (best != pool.buffers.end()) {
      data_ = best->data;
      room_ = best->room;
      pool.bytes -= room_;
      pool.buffers.erase(best);
    }
  }
  if (!data_) data_ = fresh(room_);
}

Pages::~Pages() {
  std::vector<Free> dropped;
  Kept& pool = kept();
  {
    const std::lock_guard<std::mutex> guard(pool.lock);
    pool.buffers.push_back({data_, room_});
    pool.bytes += room_;
    size_t oldest = 0;
    while (pool.bytes > kKeptBytes) {
      pool.bytes -= pool.buffers[oldest].room;
      dropped.push_back(pool.buffers[oldest++]);
    }
    pool.buffers.erase(pool.buffers.begin(), pool.buffers.begin() + static_cast<std::ptrdiff_t>(oldest));
  }
  for (const Free& buffer : dropped) drop(buffer);
}

int64_t give_back_pages() {
  std::vector<Free> dropped;
  int64_t bytes = 0;
  Kept& pool = kept();
  {
    const std::lock_guard<std::mutex> guard(pool.lock);
    dropped.swap(pool.buffers);
    bytes = pool.bytes;
    pool.bytes = 0;
  }
  for (const Free& buffer : dropped) drop(buffer);
  return bytes;
}

}  // namespace flex
