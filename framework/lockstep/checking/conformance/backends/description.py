"""What a backend says about itself."""

from __future__ import annotations

from lockstep.checking.conformance.kit import check, require
from lockstep.checking.conformance.world import World


@check("backend", usually="a version or a device is an object of the library")
def describes_itself(world: World) -> None:
    """`describe` maps text to text and includes the precision; memory is a count of bytes, or None in host memory."""
    backend, found = world.backend, world.backend.describe()
    wrong = {key: value for key, value in found.items() if not (isinstance(key, str) and isinstance(value, str))}
    require(not wrong, f"describe() has {len(wrong)} entries that are not text: {wrong}")
    require(
        found.get("precision") in ("float32", "bfloat16"), f"precision is {found.get('precision')!r}, not float32 or bfloat16"
    )
    require("device" in found, f"describe() names no device among {len(found)} entries: {sorted(found)}")
    require(isinstance(getattr(backend, "name", None), str), f"the backend's name is {getattr(backend, 'name', None)!r}")
    world.policy().evaluate(world.rollout(), ["logprobs"])
    memory = backend.peak_memory_bytes()
    right = memory is None or (isinstance(memory, int) and memory > 0)
    require(right, f"peak_memory_bytes() is {memory!r} where a positive int or None was expected")
