// The few entries of libgomp that the CPU kernels call, on std::thread: ThreadSanitizer follows those, while the
// futexes of libgomp, which it does not know, would make every parallel region a race. Linked into the extension.
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Team {
  explicit Team(unsigned count) : count(count) {}
  const unsigned count;
  std::mutex mutex;
  std::condition_variable all_arrived;
  unsigned arrived = 0, generation = 0;
  bool looping = false;
  long next = 0, end = 0, step = 1, chunk = 1;

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned mine = generation;
    if (++arrived == count) {
      arrived = 0;
      looping = false;
      ++generation;
      all_arrived.notify_all();
    }
    all_arrived.wait(lock, [&] { return generation != mine; });
  }

  bool take(long* first, long* last) {
    std::lock_guard<std::mutex> lock(mutex);
    if (step > 0 ? next >= end : next <= end) return false;
    *first = next;
    next += chunk * step;
    if (step > 0 ? next > end : next < end) next = end;
    *last = next;
    return true;
  }
};

thread_local Team* team = nullptr;
thread_local int number = 0;

void work(Team* own, int index, void (*function)(void*), void* data) {
  Team* const outer = team;
  const int before = number;
  team = own;
  number = index;
  function(data);
  team = outer;
  number = before;
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned) {
  Team own(threads ? threads : 1);
  std::vector<std::thread> others;
  for (unsigned i = 1; i < own.count; ++i) others.emplace_back(work, &own, static_cast<int>(i), function, data);
  work(&own, 0, function, data);
  for (std::thread& other : others) other.join();
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* first, long* last) {
  {
    std::lock_guard<std::mutex> lock(team->mutex);
    if (!team->looping) {
      team->next = start, team->end = end, team->step = step, team->chunk = chunk;
      team->looping = true;
    }
  }
  return team->take(first, last);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) { return team->take(first, last); }

void GOMP_loop_end() { team->barrier(); }
void GOMP_loop_end_nowait() {}
void GOMP_barrier() { team->barrier(); }
int omp_get_num_threads() { return team ? static_cast<int>(team->count) : 1; }
int omp_get_thread_num() { return number; }

}  // extern "C"
