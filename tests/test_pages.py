"""Large pages: asked for once, where the kernel gives them on request, and never over the user's head."""

import os
import subprocess
import sys

import pytest

from lockstep import pages

BEGIN = """
import os, pathlib, sys
from lockstep import pages
pages.KERNEL = pathlib.Path(sys.argv[1])
pages.begin_with_large_pages()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), *sys.argv[2:])
"""
ALL = ":".join(pages.WISHES)


@pytest.mark.parametrize(
    "kernel, told, then",
    [
        ("always [madvise] never", None, ALL),
        ("always [madvise] never", "glibc.rtld.nns=5", f"glibc.rtld.nns=5:{ALL}"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, "None"),
        ("always madvise [never]", None, "None"),
        (None, None, "None"),
    ],
)
def test_a_command_begins_again_as_the_same_process_with_the_same_arguments(tmp_path, kernel, told, then):
    file = tmp_path / "enabled"
    if kernel is not None:
        file.write_text(kernel + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {} if told is None else {"GLIBC_TUNABLES": told}
    command = [sys.executable, "-W", "ignore", "-c", BEGIN, str(file), "run", "a=[1, 2]"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        printed = process.stdout.read()
    assert process.returncode == 0 and printed == f"{process.pid} {then} run a=[1, 2]\n"
