#include "cpu/pages.h"

#include <algorithm>
#include <iterator>
#include <map>
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

struct Extent {
  char* data;
  int64_t room;
};

// Never destroyed: a buffer may outlive the statics of this file when the process ends.
struct Pool {
  std::mutex lock;
  std::map<char*, int64_t> free;  // Where kept pages begin -> their bytes; neighbours are one extent.
  int64_t kept = 0, live = 0, most = 0;  // Bytes kept, in use, and most that were in use at one time.

  // Room taken from the smallest extent that has it, or null.
  char* take(int64_t room) {
    auto best = free.end();
    for (auto it = free.begin(); it != free.end(); ++it)
      if (it->second >= room && (best == free.end() || it->second < best->second)) best = it;
    if (best == free.end()) return nullptr;
    char* const data = best->first;
    const int64_t rest = best->second - room;
    free.erase(best);
    if (rest) free.emplace(data + room, rest);
    kept -= room;
    return data;
  }

  void keep(Extent extent) {
    auto next = free.lower_bound(extent.data);
    kept += extent.room;
    if (next != free.end() && extent.data + extent.room == next->first) {
      extent.room += next->second;
      next = free.erase(next);
    }
    if (next != free.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == extent.data) {
        before->second += extent.room;
        return;
      }
    }
    free.emplace(extent.data, extent.room);
  }

  // Stops keeping this many bytes, if there are as many, from the highest address on.
  std::vector<Extent> cut(int64_t bytes) {
    std::vector<Extent> gone;
    while (bytes > 0 && !free.empty()) {
      const auto last = std::prev(free.end());
      const int64_t part = std::min(bytes, last->second);
      last->second -= part;
      gone.push_back({last->first + last->second, part});
      if (!last->second) free.erase(last);
      kept -= part;
      bytes -= part;
    }
    return gone;
  }
};

Pool& pool() {
  static Pool* const one = new Pool;
  return *one;
}

int64_t whole_pages(int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

#ifdef FLEX_HAS_MMAP

constexpr int64_t kMostKept = kKeptBytes;

void drop(const Extent& extent) { munmap(extent.data, static_cast<size_t>(extent.room)); }

char* fresh(int64_t room) {
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

// A part of what was allocated cannot be given back here.
constexpr int64_t kMostKept = 0;

void drop(const Extent& extent) { ::operator delete(extent.data); }

char* fresh(int64_t room) { return static_cast<char*>(::operator new(static_cast<size_t>(room))); }

#endif

void drop(const std::vector<Extent>& extents) {
  for (const Extent& extent : extents) drop(extent);
}

}  // namespace

Pages::Pages(int64_t bytes) : data_(nullptr), bytes_(bytes), room_(0) {
  if (bytes < 1) throw std::invalid_argument("bytes must be at least 1, got " + std::to_string(bytes));
  room_ = whole_pages(bytes);
  std::vector<Extent> gone;
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> guard(p.lock);
    data_ = p.take(room_);
    p.live += room_;
    p.most = std::max(p.most, p.live);
    gone = p.cut(p.live + p.kept - p.most);
  }
  drop(gone);
  if (data_) return;
  try {
    data_ = fresh(room_);
  } catch (...) {
    Pool& p = pool();
    const std::lock_guard<std::mutex> guard(p.lock);
    p.live -= room_;
    p.most = p.live;
    throw;
  }
}

Pages::~Pages() {
  std::vector<Extent> gone;
  const Extent mine{static_cast<char*>(data_), room_};
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> guard(p.lock);
    p.live -= room_;
    if (kMostKept) {
      p.keep(mine);
      gone = p.cut(p.kept - kMostKept);
    } else {
      gone.push_back(mine);
    }
  }
  drop(gone);
}

int64_t give_back_pages() {
  std::vector<Extent> gone;
  int64_t bytes = 0;
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> guard(p.lock);
    bytes = p.kept;
    gone = p.cut(bytes);
    p.most = p.live;
  }
  drop(gone);
  return bytes;
}

}  // namespace flex
