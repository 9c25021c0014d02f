"""The conformance kit: no false alarm on the built-in plugins, and every deliberate defect caught by the right check."""

from __future__ import annotations

import importlib

import pytest

from conftest import BACKENDS
from defects import DEFECTS, KINDS
from lockstep.checking.conformance import checks, conform, subject
from lockstep.checking.conformance.kit import KINDS as MODULES
from lockstep.registry import Plugin, registry

for _module in MODULES.values():
    importlib.import_module(f"defects.{_module}")

BUILT_IN = [
    ("backend", None),
    ("policy", "decoder"),
    ("policy", "huggingface"),
    ("policy", "lora"),
    ("reward_model", "learned"),
    ("reward_model", "function"),
    ("reward_model", "ensemble"),
    ("reward_model", "sum"),
    ("reward_model", "answer"),
    ("reward_model", "pattern"),
    ("reward_model", "length"),
    ("algorithm", "pretrain"),
    ("algorithm", "sft"),
    ("algorithm", "reward_modelling"),
    ("algorithm", "ppo"),
    ("algorithm", "policy_gradient"),
    ("algorithm", "rejection_sampling"),
    ("algorithm", "preference_optimisation"),
]


IN_FLOAT32 = ("rejection_sampling", "preference_optimisation", "sum", "answer", "pattern", "length")
"""In bfloat16 they do nothing that the others do not."""
ON_TORCH = ("sum", "answer", "pattern", "length")
"""They know no backend."""
WHERE = [
    (kind, name, precision, backend)
    for kind, name in BUILT_IN
    for precision in ("float32", "bfloat16")
    for backend in BACKENDS
    if (name not in IN_FLOAT32 or precision == "float32") and (name not in ON_TORCH or backend == "torch")
]


@pytest.mark.parametrize(("kind", "name", "precision", "backend"), WHERE, ids=str)
def test_no_false_alarm_on_a_built_in_plugin(kind, name, precision, backend):
    overrides = [f"backend.{key}={value}" for key, value in BACKENDS[backend].items() if key != "precision" and value is not None]
    found = list(conform(kind, subject(kind, name or backend, backend, precision=precision, overrides=overrides)))
    assert [f"{o.check.name}: {o.detail}" for o in found if o.status == "failed"] == []
    assert sum(o.status == "passed" for o in found) > len(found) / 4


def broken(kind: str, cls: type):
    """The class as a subject on torch."""
    target = f"{cls.__module__}:{cls.__name__}"
    if kind != "backend":
        return subject(kind, target, "torch", overrides=["backend.threads=1"], like=getattr(cls, "like", None))
    if ("backend", cls.__name__, cls.__name__) not in registry().components:
        policy = getattr(cls, "policy", "lockstep_torch.policies:Decoder")
        components = {"backend": {cls.__name__: target}, "policy": {"decoder": policy}}
        registry().add(Plugin(components, backend=cls.__name__), "defects")
    return subject(kind, cls.__name__, cls.__name__, like="torch")


@pytest.mark.parametrize(
    ("kind", "cls", "caught_by"),
    [(kind, *each) for kind in KINDS for each in DEFECTS[kind]],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_deliberate_defect_is_caught_by_the_right_check(kind, cls, caught_by):
    assert caught_by in {check.name for check in checks(kind)}
    (outcome,) = conform(kind, broken(kind, cls), only=lambda check: check.name == caught_by)
    assert outcome.status == "failed", f"{outcome.check.name} let {cls.__name__} through ({outcome.status}: {outcome.detail})"
    assert any(character.isdigit() for character in outcome.detail) or "raised" in outcome.detail


@pytest.mark.parametrize("kind", KINDS)
def test_every_check_has_been_seen_to_fail(kind):
    assert {check.name for check in checks(kind)} == {caught_by for _, caught_by in DEFECTS[kind]}
