#pragma once

#include <cstdint>

namespace flex {

// Most bytes of freed buffers that stay with the process.
constexpr int64_t kKeptBytes = int64_t{256} << 20;

// A large buffer that comes and goes with every pass, on huge pages where the system gives them on request. When it
// goes, its pages are kept for the next ones: the system would hand out fresh ones zeroed, which costs about as much as
// writing them. Buffers in use and kept pages together never exceed what was in use at one time since
// give_back_pages(), so that keeping raises no peak. Any thread may make and drop buffers.
class Pages {
 public:
  explicit Pages(int64_t bytes);  // Throws std::bad_alloc.
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_;
  int64_t bytes_, room_;
};

// Gives what is kept back to the system; returns its bytes.
int64_t give_back_pages();

}  // namespace flex
