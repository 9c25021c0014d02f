import os
import sys

try:
    here = os.getcwd()
except FileNotFoundError:
    here = ""
if not sys.flags.safe_path and sys.path[0] == here:
    del sys.path[0]  # `python -m` puts the current folder first, where its files would shadow libraries

from lockstep.cli import main

main()
