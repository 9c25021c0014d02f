"""Large pages of memory, which glibc takes only if it is told to before a program begins."""

from __future__ import annotations

import os
import sys
from pathlib import Path

KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""With '[madvise]' in it the kernel gives large pages to who asks; with '[always]' to all."""

WISHES = ("glibc.malloc.hugetlb=1", "glibc.malloc.arena_max=1")
"""Large pages, and one arena for all threads: what one thread gives back another can take."""


def begin_with_large_pages() -> None:
    """Start this command again, as the same process, with large pages wherever the kernel gives them on request.

    XLA takes the memory of a compiled program anew at every call. In pages of 4 KiB, touching it for the first time took a
    quarter of a training step on the CPU (`benchmarks/log.md`). Whoever sets ``GLIBC_TUNABLES`` for malloc decides alone.
    """
    told = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" in told or not KERNEL.exists() or "[madvise]" not in KERNEL.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (told, *WISHES)))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
