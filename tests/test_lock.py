"""constraints.txt, which `make` installs without asking what depends on what. `pip check`, which `make` runs after it, finds
what a library lacks, but knows nothing of extras; here are the project's own."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
LOCKED = {canonicalize_name(name): version for name, version in LOCK.items()}


def required(extras: set[str]) -> list[Requirement]:
    """What the project needs with these extras, and with those that they name."""
    found = []
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]:
        requirement = Requirement(text)
        found += required(requirement.extras) if requirement.name == PROJECT["name"] else [requirement]
    return found


def test_everything_that_make_installs_is_in_the_lock_at_a_version_that_fits():
    needed = required({"all"})
    assert {"numpy", "torch", "jax", "gguf", "pytest", "autograd"} <= {requirement.name for requirement in needed}
    for requirement in needed:
        assert requirement.specifier.contains(LOCKED.get(canonicalize_name(requirement.name), "0")), requirement
    assert {"uv", "editables"} <= LOCKED.keys()  # of `make` itself
