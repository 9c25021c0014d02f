"""What one process of test_conformance.py does: python defects_of_several.py FILE. It runs the checks of those defects that need
several processes, and leaves [class, status, detail] of each."""

import sys
from pathlib import Path

import defects.meshes  # noqa: F401 - which registers them
from defects import DEFECTS, caught
from lockstep.launchers import place
from lockstep.storage.files import write_json


def main(file: Path) -> None:
    found = []
    for cls, caught_by in DEFECTS["backend"]:
        if hasattr(cls, "count"):
            outcome = caught("backend", cls, caught_by)
            found.append([cls.__name__, outcome.status, outcome.detail])
    if place().rank == 0:
        write_json(file, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
