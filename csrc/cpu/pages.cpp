#include "cpu/kernels.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace flex {

void advise_huge_pages(void* address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const auto first = reinterpret_cast<uintptr_t>(address);
  // Whole huge pages inside the range: nothing beside it is touched, and no more memory is held.
  const uintptr_t start = (first + kHuge - 1) / kHuge * kHuge, end = (first + bytes) / kHuge * kHuge;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace flex
