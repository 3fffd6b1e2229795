"""Mends the unpacked sources of Bochs 3.0 in place, for scripts/amx_bochs: mend_bochs.py FOLDER

Tile data can be switched off by IA32_XFD, without which Linux leaves tiles off (Intel SDM, volume 1, 13.14):
  cpu/avx/amx.h           both registers are kept; what counts tiles in use starts at 0
  cpu/avx/amx.cc          an instruction on tile data that is off is #NM
  cpu/cpuid.cc            leaf 13 says that XFD is there, and for which component
  cpu/msr.cc              both registers can be read and written
  cpu/xsave.cc            XRSTOR of tile data that is off is #NM; XSAVE takes it as unused
Tile state is saved and restored as it is:
  cpu/xsave.cc            a tile's rows and bytes a row are saved where the architecture has them
  cpu/xsave.cc            all 16 rows of a tile are saved and restored, not 8
  cpu/xsave.cc            tile data is in use when any tile is, not when none is
Of VCVTNE2PS2BF16:
  cpu/avx/avx512_bf16.cc  the upper half of the result is of the first operand from its beginning on
Of TDPBSUD:
  cpu/avx/amx.cc          bytes of the first operand are signed

An edit lies where a regular expression matches: a given number of times, or else nothing is written.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple


class Edit(NamedTuple):
    file: str
    how: str  # "replace" what matches; or put lines "before" or "after" the line where a match begins or ends
    anchor: str
    text: str
    times: int = 1


EDITS = [
    Edit("avx/amx.h", "replace", r"start_row\(0\)", "start_row(0), tile_use_tracker(0), xfd(0), xfd_err(0)"),
    Edit(
        "avx/amx.h",
        "after",
        r"unsigned tile_use_tracker",
        """
  Bit64u xfd, xfd_err; // IA32_XFD, IA32_XFD_ERR: tile data is the only component that they know
""",
    ),
    Edit(
        "avx/amx.cc",
        "before",
        r"::TILEZERO_Tnnn\(",
        """\
static bool tiledata_disabled(AMX *amx)
{
  if (! (amx->xfd & BX_XCR0_XTILEDATA_MASK)) return false;
  amx->xfd_err |= BX_XCR0_XTILEDATA_MASK;
  return true;
}

""",
    ),
    Edit(
        "avx/amx.cc",
        "after",
        r"::(TILEZERO_Tnnn|check_tile)\([^{]*\{",
        """\
  if (tiledata_disabled(BX_CPU_THIS_PTR amx)) exception(BX_NM_EXCEPTION, 0);

""",
        2,
    ),
    Edit("avx/amx.cc", "replace", r"(?<=DPBDSU\(Bit32u x, Bit32u y\)\n\{\n  const )Bit8u", "Bit8s"),
    Edit("avx/avx512_bf16.cc", "replace", r"(?<=to_bfloat16\(op1\.vmm32u\()n", "n - DWORD_ELEMENTS(len)"),
    Edit(
        "cpuid.cc",
        "after",
        r"eax \|= \(1<<3\)",
        """\
    if (is_cpu_extension_supported(BX_ISA_AMX))
      leaf->eax |= (1<<4);
""",
    ),
    Edit(
        "cpuid.cc",
        "after",
        r"ecx = \(cpu->ia32_xss_suppmask",
        """\
      if (subfunction == xcr0_t::BX_XCR0_XTILEDATA_BIT)
        leaf->ecx |= (1<<2);
""",
    ),
    Edit(
        "msr.cc",
        "after",
        r'"msr\.h"',
        """\
#if BX_SUPPORT_AMX
#include "avx/amx.h"
#endif
""",
    ),
    Edit(
        "msr.cc",
        "after",
        r"msr_desc\[BX_MSR_XSS\][^#]*#endif",
        """
#if BX_SUPPORT_AMX
  msr_desc[BX_MSR_IA32_XFD] = new MSR_Descriptor("MSR_IA32_XFD", BX_ISA_AMX);
  msr_desc[BX_MSR_IA32_XFD_ERROR] = new MSR_Descriptor("MSR_IA32_XFD_ERR", BX_ISA_AMX);
#endif
""",
    ),
    Edit(
        "msr.cc",
        "after",
        r"msr\.ia32_xss;[^#]*#endif",
        """
#if BX_SUPPORT_AMX
    case BX_MSR_IA32_XFD:
    case BX_MSR_IA32_XFD_ERROR:
      if (! BX_CPU_THIS_PTR amx)
        return handle_unknown_rdmsr(index, msr);
      val64 = index == BX_MSR_IA32_XFD ? BX_CPU_THIS_PTR amx->xfd : BX_CPU_THIS_PTR amx->xfd_err;
      break;
#endif
""",
    ),
    Edit(
        "msr.cc",
        "after",
        r"msr\.ia32_xss = [^#]*#endif",
        """
#if BX_SUPPORT_AMX
    case BX_MSR_IA32_XFD:
    case BX_MSR_IA32_XFD_ERROR:
      if (! BX_CPU_THIS_PTR amx)
        return handle_unknown_wrmsr(index, val_64);
      if (val_64 & ~Bit64u(BX_XCR0_XTILEDATA_MASK))
        return false;
      (index == BX_MSR_IA32_XFD ? BX_CPU_THIS_PTR amx->xfd : BX_CPU_THIS_PTR amx->xfd_err) = val_64;
      break;
#endif
""",
    ),
    Edit(
        "xsave.cc",
        "after",
        r"xsave_restore\[\][^#]*#endif",
        """
#if BX_SUPPORT_AMX
#include "avx/amx.h"
#endif
""",
    ),
    Edit(
        "xsave.cc",
        "after",
        r"restore_mask =",
        """
#if BX_SUPPORT_AMX
  if (BX_CPU_THIS_PTR amx && (requested_feature_bitmap & restore_mask & BX_CPU_THIS_PTR amx->xfd) != 0) {
    BX_CPU_THIS_PTR amx->xfd_err |= BX_CPU_THIS_PTR amx->xfd;
    exception(BX_NM_EXCEPTION, 0);
  }
#endif
""",
    ),
    Edit("xsave.cc", "replace", r"(?<=tilecfg\[n\]\.)rows", "bytes_per_row"),
    Edit("xsave.cc", "replace", r"(?<=tilecfg\[n\]\.)bytes_per_row", "rows"),
    Edit("xsave.cc", "replace", r"(?<=row < )BX_TILE_REGISTERS", "BX_TILE_MAX_ROWS", 2),
    Edit("xsave.cc", "replace", r"(?<=tile_use_tracker )==", "!="),
    Edit("xsave.cc", "replace", r"all tiles are", "not all tiles are"),
    Edit(
        "xsave.cc",
        "before",
        r"return xinuse;",
        """\
#if BX_SUPPORT_AMX
  if (BX_CPU_THIS_PTR amx)
    xinuse &= ~Bit32u(BX_CPU_THIS_PTR amx->xfd);
#endif

""",
    ),
]


def places(edit: Edit, source: str) -> list[tuple[int, int]]:
    """Where in a file's source the edit's text is to be, as ranges that it replaces."""
    found = [m.span() for m in re.finditer(edit.anchor, source)]
    if edit.how == "replace":
        return found
    if edit.how == "before":
        return [(at, at) for at in (source.rfind("\n", 0, begin) + 1 for begin, _ in found)]
    return [(at, at) for at in (source.index("\n", end) + 1 for _, end in found)]


def mend(folder: Path) -> None:
    mended: dict[Path, bytes] = {}
    for file in dict.fromkeys(edit.file for edit in EDITS):
        path = folder / "cpu" / file
        try:
            source = path.read_bytes().decode("latin-1")
        except OSError as error:
            sys.exit(f"{path}: {error.strerror}; these are not the sources of Bochs 3.0")
        changes: list[tuple[int, int, str]] = []
        for edit in (e for e in EDITS if e.file == file):
            found = places(edit, source)
            if len(found) != edit.times:
                sys.exit(
                    f"{path}: {edit.anchor} matches {len(found)} times instead of {edit.times}; "
                    "these are not the sources of Bochs 3.0"
                )
            changes += [(begin, end, edit.text) for begin, end in found]
        for begin, end, text in sorted(changes, reverse=True):
            source = source[:begin] + text + source[end:]
        mended[path] = source.encode("latin-1")
    for path, content in mended.items():
        path.write_bytes(content)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: mend_bochs.py FOLDER")
    mend(Path(sys.argv[1]))
