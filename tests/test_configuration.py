"""YAML to dataclasses: what converts, and what each mistake is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from lockstep.builtin import CONF
from lockstep.config.schema import differences, parse
from lockstep.errors import ConfigError
from lockstep.registry import registry


@dataclass(frozen=True)
class Inner:
    size: int
    rate: float | None


@dataclass(frozen=True)
class Outer:
    name: str
    flag: bool
    rate: float
    limit: int | None
    mode: Literal["fast", "slow"]
    betas: tuple[float, float]
    names: tuple[str, ...]
    table: Mapping[str, int]
    inner: Inner
    perhaps: Inner | None
    extra: Any


GOOD = {
    "name": "ppo", "flag": True, "rate": 0.5, "limit": None, "mode": "fast", "betas": [0.9, 0.95], "names": ["a", "b"],
    "table": {"x": 1}, "inner": {"size": 3, "rate": None}, "perhaps": None, "extra": [object],
}  # fmt: skip


def error(**changes):
    with pytest.raises(ConfigError) as caught:
        parse(Outer, GOOD | changes, "algorithm")
    return str(caught.value)


def test_values_arrive_as_their_types():
    made = parse(Outer, GOOD, "algorithm")
    assert made == Outer("ppo", True, 0.5, None, "fast", (0.9, 0.95), ("a", "b"), {"x": 1}, Inner(3, None), None, [object])


def test_an_integer_is_taken_for_a_float_and_stays_a_float():
    made = parse(Outer, GOOD | {"rate": 1, "betas": [1, 0]}, "algorithm")
    assert isinstance(made.rate, float) and all(isinstance(b, float) for b in made.betas)


def test_an_optional_group_may_be_there_or_not():
    assert parse(Outer, GOOD | {"perhaps": {"size": 1, "rate": 2}}, "algorithm").perhaps == Inner(1, 2.0)


def test_an_unknown_key_suggests_the_nearest_and_lists_all():
    assert error(limmit=3) == (
        "Unknown key algorithm.limmit. Did you mean 'limit'? "
        "Known: betas, extra, flag, inner, limit, mode, name, names, perhaps, rate, table."
    )


def test_an_unknown_key_inside_a_group_is_named_by_its_path():
    assert error(inner={"size": 3, "rat": 1}) == "Unknown key algorithm.inner.rat. Did you mean 'rate'? Known: rate, size."
    assert error(perhaps={"siz": 3, "rate": 1}).startswith("Unknown key algorithm.perhaps.siz. Did you mean 'size'?")


def test_missing_keys_are_listed_by_their_paths():
    values = {k: v for k, v in GOOD.items() if k not in ("rate", "mode")}
    with pytest.raises(ConfigError) as caught:
        parse(Outer, values, "algorithm")
    assert str(caught.value) == "Missing: algorithm.rate, algorithm.mode. Set it on the command line or in YAML."


@pytest.mark.parametrize("key", ["name", "limit", "mode", "inner"])
def test_a_value_left_open_asks_for_it(key):
    assert error(**{key: "???"}) == f"Missing: algorithm.{key}. Set it on the command line: algorithm.{key}=..."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "algorithm.name=3 should be str, not int."),
        ({"flag": 1}, "algorithm.flag=1 should be bool, not int."),
        ({"flag": "yes"}, "algorithm.flag='yes' should be bool, not str."),
        ({"rate": "0.1"}, "algorithm.rate='0.1' should be float, not str."),
        ({"rate": True}, "algorithm.rate=True should be float, not bool."),
        ({"rate": None}, "algorithm.rate=None should be float, not NoneType."),
        ({"limit": 1.5}, "algorithm.limit=1.5 should be int, not float."),
        ({"limit": True}, "algorithm.limit=True should be int, not bool."),
        ({"betas": [0.9]}, "algorithm.betas=[0.9] should be tuple[float, float], not list."),
        ({"betas": [0.9, "x"]}, "algorithm.betas[1]='x' should be float, not str."),
        ({"names": ["a", 2]}, "algorithm.names[1]=2 should be str, not int."),
        ({"names": "a"}, "algorithm.names='a' should be tuple[str, ...], not str."),
        ({"table": {"x": "1"}}, "algorithm.table.x='1' should be int, not str."),
        ({"inner": 3}, "algorithm.inner must be a group of keys, not 3."),
        ({"inner": None}, "algorithm.inner must be a group of keys, not None."),
        ({"inner": {"size": "3", "rate": 1}}, "algorithm.inner.size='3' should be int, not str."),
    ],
)  # fmt: skip
def test_a_wrong_type_says_where_what_and_what_it_should_be(changes, message):
    assert error(**changes) == message


def test_a_choice_lists_the_choices():
    assert error(mode="fats") == "algorithm.mode='fats' is not one of fast, slow. Did you mean 'fast'?"
    assert error(mode=None) == "algorithm.mode=None is not one of fast, slow."


@dataclass(frozen=True)
class Either:
    value: int | str | None


def test_a_union_takes_each_of_its_types_and_names_all_of_them():
    assert [parse(Either, {"value": v}, "x").value for v in (1, "a", None)] == [1, "a", None]
    with pytest.raises(ConfigError, match=r"x.value=\[\] should be int or str or null, not list."):
        parse(Either, {"value": []}, "x")


def test_differences_are_listed_leaf_by_leaf():
    old = {"sft": {"epochs": 1, "lr": 0.1}, "seed": 0, "gone": 1}
    new = {"sft": {"epochs": 2, "lr": 0.1}, "seed": 0, "come": {"x": 1}}
    assert differences(old, new) == ["sft.epochs: 1 -> 2", "gone: 1 -> (absent)", "come: (absent) -> {'x': 1}"]
    assert differences(old, old) == []


@pytest.mark.parametrize("file", sorted((CONF / "algorithm").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_algorithm_file_is_complete_and_holds_nothing_unknown(file):
    values = OmegaConf.to_container(OmegaConf.load(file))
    cls = registry().resolve("algorithm", values.pop("name"))
    parse(cls.Config, values, "algorithm")
