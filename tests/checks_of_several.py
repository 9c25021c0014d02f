"""What one process of test_processes.py does: python checks_of_several.py FILE BACKEND [ALGORITHM...]. It runs the kit's checks
of meshes on the backend, or all checks of the algorithms, and process 0 leaves [name, status, detail] of each."""

import sys
from pathlib import Path

from lockstep.checking.conformance import meshes
from lockstep.checking.conformance.kit import conform
from lockstep.checking.conformance.subjects import subject
from lockstep.launchers import place
from lockstep.storage.files import write_json


def main(file: Path, backend: str, *algorithms: str) -> None:
    overrides, outcomes = ["backend.device=cpu", "backend.mesh.fsdp=-1"], []
    for name in algorithms:
        outcomes += conform("algorithm", subject("algorithm", name, backend, overrides=overrides))
    if not algorithms:
        world = subject("backend", backend, backend, overrides=overrides)
        outcomes += conform("backend", world, lambda check: check.run.__module__ == meshes.__name__)
    if place().rank == 0:
        write_json(file, [[each.check.name, each.status, each.detail] for each in outcomes])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
