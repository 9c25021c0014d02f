"""YAML to dataclasses: what converts, and what each mistake is told."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf

from lockstep.builtin import CONF
from lockstep.commands import plugins
from lockstep.config.compose import compose, group
from lockstep.config.root import GROUPS, Root, component_config
from lockstep.config.schema import REQUIRED, differences, parse, setting
from lockstep.data.reading import Source
from lockstep.errors import ConfigError, LockstepError, RegistryError
from lockstep.learning.episodes import EnvironmentConfig
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.registry import KINDS, Component, Plugin, imported, registry
from lockstep.runs.attacks import AttackConfig
from lockstep.runs.collection import CollectionConfig
from lockstep.runs.evaluation import EvaluationConfig
from lockstep.runs.experiment import Experiment, finished, run_name
from lockstep.runs.stages import StageConfig
from lockstep_rlhf.algorithms.ppo import PPO
from lockstep_torch.backend import TorchBackend


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
        ({"name": 3}, """algorithm.name=3 should be str, not int. For the text, type: algorithm.name="'3'" """.strip()),
        ({"flag": 1}, "algorithm.flag=1 should be bool, not int."),
        ({"flag": "yes"}, "algorithm.flag='yes' should be bool, not str."),
        ({"rate": "0.1"}, "algorithm.rate='0.1' should be float, not str."),
        ({"rate": True}, "algorithm.rate=True should be float, not bool."),
        ({"rate": None}, "algorithm.rate=None should be float, not NoneType."),
        ({"limit": 1.5}, "algorithm.limit=1.5 should be int, not float."),
        ({"limit": True}, "algorithm.limit=True should be int, not bool."),
        ({"betas": [0.9]}, "algorithm.betas=[0.9] should be [float, float], not list."),
        ({"betas": [0.9, "x"]}, "algorithm.betas[1]='x' should be float, not str."),
        ({"names": ["a", 2]}, "algorithm.names[1]=2 should be str, not int."),
        ({"names": "a"}, "algorithm.names='a' should be a list of str, not str. For a list of one, type: algorithm.names='[a]'"),
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


@dataclass(frozen=True)
class Files:
    prompts: tuple[dict[str, Any], ...]
    options: dict[str, Any]


@pytest.mark.parametrize("given", ["x.jsonl", ["x.jsonl"]])
def test_a_file_where_a_list_of_files_with_settings_belongs_is_shown_as_one(given):
    with pytest.raises(ConfigError, match=r"group.? of keys, not str. For a file, type: data.prompts='\[{path: x.jsonl}\]'$"):
        parse(Files, {"prompts": given, "options": {}}, "data")
    with pytest.raises(ConfigError, match=r"data.options='x' should be a group of keys, not str.$"):
        parse(Files, {"prompts": [], "options": "x"}, "data")


def test_differences_are_listed_leaf_by_leaf():
    old = {"sft": {"epochs": 1, "lr": 0.1}, "seed": 0, "gone": 1}
    new = {"sft": {"epochs": 2, "lr": 0.1}, "seed": 0, "come": {"x": 1}}
    assert differences(old, new) == ["sft.epochs: 1 -> 2", "gone: 1 -> (absent)", "come: (absent) -> {'x': 1}"]
    assert differences(old, old) == []


# ---------------------------------------------------------------------------------------------------- defaults and ranges


@dataclass(frozen=True)
class Adam:
    rate: float = setting(3e-4, "Step size.", above=0)
    eps: float = setting(1e-8, "Added to the root.", above=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "Decay.", least=0, below=1)


@dataclass(frozen=True)
class Declared:
    path: str = setting(REQUIRED, "A folder.")
    count: int = setting(1, "How many.", least=1)
    share: float | None = setting(None, "A fraction; null: none.", least=0, most=1)
    bound: float = setting(math.inf, "The most that counts.", above=0, finite=False)
    plain: float = 0.0
    table: Mapping[str, int] = setting({"x": 1}, "Counts.")
    adam: Adam = setting(Adam(eps=1e-5), "Of this one.")


def test_absent_keys_take_their_defaults_and_a_required_one_is_missed():
    assert parse(Declared, {"path": "a", "count": 3}, "x") == Declared("a", count=3)
    with pytest.raises(ConfigError, match=r"^Missing: x.path. Set it on the command line or in YAML.$"):
        parse(Declared, {}, "x")


def test_in_a_group_of_a_group_the_outer_default_stands_in():
    adam = parse(Declared, {"path": "a", "adam": {"rate": 1.0}}, "x").adam
    assert adam == Adam(rate=1.0, eps=1e-5) and Declared("a").adam.rate == 3e-4


def test_a_default_that_can_change_is_not_shared():
    assert parse(Declared, {"path": "a"}, "x").table is not parse(Declared, {"path": "a"}, "x").table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "x.count=0 must be at least 1."),
        ({"share": 1.01}, "x.share=1.01 must be at least 0 and at most 1, or null."),
        ({"share": -0.5}, "x.share=-0.5 must be at least 0 and at most 1, or null."),
        ({"share": math.nan}, "x.share=nan must be a finite number, or null."),
        ({"bound": 0.0}, "x.bound=0.0 must be above 0."),
        ({"bound": math.nan}, "x.bound=nan must be above 0."),
        ({"plain": math.nan}, "x.plain=nan must be a finite number."),
        ({"plain": -math.inf}, "x.plain=-inf must be a finite number."),
        ({"adam": {"rate": math.inf}}, "x.adam.rate=inf must be a finite number."),
        ({"adam": {"betas": [0.9, 1]}}, "x.adam.betas[1]=1.0 must be at least 0 and below 1."),
    ],
)
def test_a_number_out_of_range_says_where_what_and_the_range(changes, message):
    with pytest.raises(ConfigError) as caught:
        parse(Declared, {"path": "a"} | changes, "x")
    assert str(caught.value) == message


def test_the_ends_of_a_range_null_and_a_declared_infinity_are_taken():
    for share in (0, 1.0, None):
        assert parse(Declared, {"path": "a", "share": share, "bound": math.inf}, "x").share == share


# ---------------------------------------------------------------------------------------------------- built-in components

GIVEN = {
    "url": "http://a/b", "functions": ["a:b"], "parts": {"a": {"name": "length"}}, "weights": {"a": 1.0},
    "reward_model": {"name": "length"}, "judge": {"name": "length"},
}  # fmt: skip
"""Values of required keys that may not be any text."""
PLAIN = ("evaluation", "collection", "attack", "optimizer")
FILES = sorted(file for kind in (*KINDS, *PLAIN) for file in (CONF / kind).glob("*.yaml"))


def group_of(kind: str, name: str) -> tuple[type, dict[str, Any]]:
    """The class of a file's configuration, and the file with its defaults list resolved."""
    if kind in PLAIN:
        values = OmegaConf.to_container(OmegaConf.load(CONF / kind / f"{name}.yaml"))
        classes = {"evaluation": EvaluationConfig, "collection": CollectionConfig, "attack": AttackConfig}
        return {**classes, "optimizer": OptimizerConfig}[kind], values
    values = group(kind, name)
    if name == "limits":  # with which the files of environments begin
        return EnvironmentConfig, values
    name = values.pop("name")
    component = next(c for c in registry() if (c.kind, c.name) == (kind, name))
    return imported(component.target).Config, values  # which needs none of the libraries that the component does


def absent(cls: type, values: Mapping[str, Any], where: str) -> list[str]:
    """Fields of the dataclass, at every depth, that the values lack."""
    found, hints = [], typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in values:
            found.append(f"{where}.{field.name}")
        elif dataclasses.is_dataclass(hints[field.name]):
            found += absent(hints[field.name], values[field.name], f"{where}.{field.name}")
    return found


def declared(cls: type) -> Iterator[dataclasses.Field]:
    for field in dataclasses.fields(cls):
        yield field
        hint = typing.get_type_hints(cls)[field.name]
        yield from declared(hint) if dataclasses.is_dataclass(hint) else ()


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_a_file_is_complete_and_equals_the_defaults_of_its_dataclass(file):
    cls, values = group_of(file.parent.name, file.stem)
    assert absent(cls, values, file.stem) == []
    required = {key: GIVEN.get(key, "given") for key, value in values.items() if value == "???"}
    assert required.keys() == {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory}
    if (
        file.parent.name in PLAIN or group(file.parent.name, file.stem).get("name", file.stem) == file.stem
    ):  # else it is a published method: a component with other values
        assert parse(cls, values | required, "x") == parse(cls, required, "x")
    assert all(field.metadata["doc"] for field in declared(cls))


def test_the_root_equals_its_defaults():
    values = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    scalars = {key: value for key, value in values.items() if key not in ("defaults", "hydra")}
    assert scalars == {f.name: f.default for f in dataclasses.fields(Root) if f.name in scalars} and len(scalars) == 10


EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


def needed(experiment):
    """What an experiment leaves to the command line."""
    chosen = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml").get("defaults", [])
    groups = {key: value for each in chosen if not isinstance(each, str) for key, value in each.items()}
    checkpoint = groups.get("override /policy") in ("huggingface", "lora")
    own = {"human": ["data.folder=x"], "red_team": ["data.goals=[{path: x}]"]}
    return [*(["policy.path=a/b"] if checkpoint else []), *own.get(experiment, [])]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_complete_so_that_no_identity_depends_on_a_default(name):
    config = compose([f"experiment={name}", *needed(name)])
    groups = [("evaluation", EvaluationConfig, config["evaluation"])]
    for key, kind in ((key, kind) for key, kind in GROUPS.items() if config[key] is not None):
        groups.append((key, registry().resolve(kind, config[key]["name"], "torch").Config, config[key]))
    for stage in config["stages"].values():
        if "algorithm" in stage:
            groups.append(("stage", registry().resolve("algorithm", stage["algorithm"]["name"]).Config, stage["algorithm"]))
    assert [absent(cls, values, key) for key, cls, values in groups] == [[]] * len(groups)


def test_the_optimizer_of_each_algorithm_is_one_file_and_what_differs():
    for name in ("ppo", "pretrain", "sft", "reward_modelling"):
        own = OmegaConf.to_container(OmegaConf.load(CONF / "algorithm" / f"{name}.yaml"))
        assert "/optimizer@optimizer: adam" in str(own["defaults"]).replace("'", "") and "betas" not in own["optimizer"]
        assert group("algorithm", name)["optimizer"]["betas"] == [0.9, 0.95]
    overrides = ["algorithm.optimizer.learning_rate=1e-4", "algorithm.value_optimizer.ema_decay=0.9"]
    changed = compose(overrides)["algorithm"]
    assert (changed["optimizer"]["learning_rate"], changed["optimizer"]["eps"]) == (1e-4, 1e-5)
    assert changed["value_optimizer"]["ema_decay"] == 0.9 and changed["optimizer"]["ema_decay"] is None


def test_a_recipes_average_of_all_weights_leaves_out_the_value_network():
    changed = compose(["experiment=tldr", "adam.ema_decay=0.9", "adam.weight_decay=0.5"])["algorithm"]
    plain = changed["optimizer"] | {"ema_decay": None}
    assert changed["optimizer"]["ema_decay"] == 0.9 and changed["value_optimizer"] == plain and plain["weight_decay"] == 0.5


OUT_OF_RANGE = {
    "algorithm.iterations": 0, "algorithm.epochs": 0, "algorithm.micro_batch_size": 0, "algorithm.lengths.prompt": 0,
    "algorithm.temperature": -1.0, "algorithm.kl_coef": -0.1, "algorithm.kl_target": 0, "algorithm.kl_horizon": 0,
    "algorithm.gamma": 1.5, "algorithm.lam": -0.1, "algorithm.clip_range": 0, "algorithm.value_clip_range": -1,
    "algorithm.value_coef": -1, "algorithm.correction.high": 0, "algorithm.ptx_ratio": -1, "algorithm.ptx_coef": -1,
    "algorithm.optimizer.learning_rate": 0, "algorithm.optimizer.eps": 0, "algorithm.optimizer.weight_decay": -1,
    "algorithm.optimizer.max_grad_norm": 0, "algorithm.value_optimizer.ema_decay": 1, "algorithm.schedule.warmup_steps": -1,
    "algorithm.schedule.final": 1.1, "pretrain.epochs": 0, "pretrain.heldout_examples": -1, "sft.dropout": 1,
    "sft.pretrain_mix": 1, "reward.batch_size": 0, "reward.lengths.multiple": 0, "reward_model.micro_batch_size": 0,
    "evaluation.prompts": 0, "evaluation.temperature": -0.1, "policy.layers": 0, "policy.rope_theta": 0, "data.texts": 0,
    "backend.threads": 0, "seed": -1, "checkpoint_every": 0, "samples_every": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def complete():
    return compose([])


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(config)
    *groups, key = path.split(".")
    functools.reduce(dict.__getitem__, groups, made)[key] = value
    return made


@pytest.mark.parametrize("path", OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused_by_the_key_that_was_typed(complete, path):
    value = OUT_OF_RANGE[path]
    with pytest.raises(ConfigError, match=rf"^{re.escape(path)}={value}(\.0)? must be (at least|above) "):
        Experiment(changed(complete, path, value))


@pytest.mark.parametrize("path", [p for p in OUT_OF_RANGE if isinstance(OUT_OF_RANGE[p], float) or "optimizer" in p])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_float_is_nan_or_infinite(complete, path, value):
    with pytest.raises(ConfigError, match=rf"^{re.escape(path)}={value} must be a finite number"):
        Experiment(changed(complete, path, value))


def test_a_score_for_unfinished_responses_that_is_not_a_number_is_refused(complete):
    with pytest.raises(ConfigError, match="^algorithm.unfinished_score=nan must be a finite number, or null.$"):
        Experiment(changed(complete, "algorithm.unfinished_score", math.nan))


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("reward_model", "endpoint", "timeout_seconds", 0.0), ("reward_model", "endpoint", "batch_size", 0),
        ("reward_model", "endpoint", "backoff_seconds", -1.0), ("reward_model", "function", "retries", -1),
        ("reward_model", "ensemble", "coef", math.nan), ("policy", "lora", "rank", 0), ("policy", "lora", "alpha", 0.0),
        ("data", "files", "heldout_fraction", 1.0), ("data", "files", "seed", -1), ("tracker", "tensorboard", "flush_seconds", 0),
    ],
)  # fmt: skip
def test_components_that_are_not_the_default_ones_have_ranges_too(kind, name, path, value):
    cls, values = group_of(kind, name)
    values = {key: GIVEN.get(key, "given") if given == "???" else given for key, given in values.items()}
    with pytest.raises(ConfigError, match=rf"^{kind}.{path}={value} must be (at least|above|a finite number)"):
        parse(cls, values | {path: value}, kind)


# ------------------------------------------------------------------------------------------- every number of every component

GROUP_CLASSES = {
    "the root": Root,
    "a stage": StageConfig,
    "an evaluation": EvaluationConfig,
    "a collection": CollectionConfig,
    "a source": Source,
} | {f"{c.kind} {c.name}{f' on {c.backend}' if c.backend else ''}": c.load().Config for c in registry() if not c.missing()}
NUMBERS = {int: "whole", float: "real"}


def numbers(cls: type, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dataclasses.Field, set[type], int]]:
    """(path, field, types, length of the tuple or 0) of every number in a dataclass, at every depth."""
    for field in dataclasses.fields(cls):
        hint, path = typing.get_type_hints(cls)[field.name], (*above, field.name)
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint, path)
            continue
        inside = typing.get_args(hint) if typing.get_origin(hint) is tuple else ()
        types = {each for each in (*typing.get_args(hint), hint) if each in NUMBERS}
        if types:
            yield (*path, "key") if typing.get_origin(hint) is Mapping else path, field, types, len(inside)


def outside(field: dataclasses.Field, types: set[type]) -> list[float]:
    """Numbers that the field must refuse."""
    allowed, found = field.metadata["range"], [2**70, -(2**70)]
    found += [math.nan, math.inf, -math.inf, 1e300, -1e300, 1e-300] if float in types else []
    found += [allowed.least - 1] if allowed.least not in (None, -math.inf) else []
    found += [allowed.most + 1] if allowed.most is not None else []
    return found + [end for end in (allowed.above, allowed.below) if end is not None]


@pytest.mark.parametrize("name", GROUP_CLASSES)
def test_every_number_declares_its_range_and_nothing_outside_of_it_is_parsed(name):
    cls = GROUP_CLASSES[name]
    required = {f.name: GIVEN.get(f.name, "given") for f in dataclasses.fields(cls) if f.default is f.default_factory}
    if "stages" in required:  # the root, whose components are groups
        required |= {key: {} for key in ("stages", "backend", "data", "policy", "tracker")}
    parse(cls, required, "x")
    for path, field, types, length in numbers(cls):
        ends = dataclasses.asdict(field.metadata["range"])
        assert field.metadata["range"].finite and any(ends[end] is not None for end in ("least", "above", "most", "below")), path
        for number in outside(field, types):
            value: Any = [number] * length if length else number
            value = {"a": number} if path[-1] == "weights" else value
            for key in reversed(path):
                value = {key: value}
            with pytest.raises(ConfigError, match=rf"^x\.{re.escape('.'.join(path))}(\[0\]|\.a)?=\S+ (must|should) be "):
                parse(cls, required | value, "x")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"path": "x", "weight": -1}], "data.prompts[0].weight=-1.0 must be above 0, or null."),
        ([{"path": "x", "weight": math.nan}], "data.prompts[0].weight=nan must be a finite number, or null."),
        ([{"path": 5}], """data.prompts[0].path=5 should be str, not int."""),
        ([{"path": "x", "wieght": 1}], "Unknown key data.prompts[0].wieght. Did you mean 'weight'?"),
        ([{"path": "x", "split": "a["}], "split 'a[' should look like train, test[:100] or train[500:1000]."),
    ],
)
def test_a_source_of_data_is_checked_with_the_rest_of_the_configuration(complete, sources, message):
    data = group("data", "files") | {"prompts": sources}
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        Experiment(complete | {"data": data})


def test_an_adapter_of_no_layer_is_refused():
    cls, values = group_of("policy", "lora")
    with pytest.raises(ConfigError, match="^policy.targets is empty, so there is nothing to train"):
        parse(cls, values | {"path": "x", "targets": []}, "policy")


def test_numbers_of_numpy_are_numbers():
    made = parse(Declared, {"path": "a", "count": np.int64(3), "share": np.float32(0.5)}, "x")
    assert (made.count, made.share) == (3, 0.5) and (type(made.count), type(made.share)) == (int, float)
    with pytest.raises(ConfigError, match="x.count=True should be int, not bool"):
        parse(Declared, {"path": "a", "count": True}, "x")


def test_numbers_that_the_arithmetic_cannot_hold_say_so():
    say = lambda **values: pytest.raises(ConfigError, parse, Adam, values, "x").value.args[0]  # noqa: E731
    size = "must be between 1.2e-38 and 3.4e+38 in size: the arithmetic is float32."
    assert say(rate=1e300) == f"x.rate=1e+300 {size}"
    assert say(eps=1e-60) == f"x.eps=1e-60 {size}"
    assert say(rate=10**400).startswith("x.rate=1000000") and say(rate=10**400).endswith("... must be an integer of 64 bits.")
    assert "a number of thousands of digits" in say(rate=10**5000)
    assert parse(Adam, {"rate": 1e38, "eps": 2e-38}, "x").rate == 1e38


ROTARY = "of even width, as rotary positions need."
TOGETHER = {
    f"policy.hidden_size=100 does not divide into policy.heads=3 {ROTARY} Set heads to one of 1, 2, 5, 10, 25, 50.": {
        "policy.hidden_size": 100, "policy.heads": 3},
    f"policy.hidden_size=12 does not divide into policy.heads=4 {ROTARY} Set heads to one of 1, 2, 3, 6.": {
        "policy.hidden_size": 12},
    f"policy.hidden_size=7 does not divide into policy.heads=4 {ROTARY} Set an even hidden_size.": {"policy.hidden_size": 7},
    "policy.heads=4 is not divisible by policy.kv_heads=3. Set kv_heads to one of 1, 2, 4.": {"policy.kv_heads": 3},
    "policy.heads=4 is not divisible by policy.kv_heads=8. Set kv_heads to one of 1, 2, 4.": {"policy.kv_heads": 8},
    "algorithm.kl_horizon=12.8 with 64 episodes may take the KL coefficient below 0 in one iteration. Set kl_horizon above "
    "12.8, or kl_target=null.": {"algorithm.kl_target": 6, "algorithm.kl_horizon": 12.8},
    "algorithm.kl_target adapts the KL coefficient by factors, and algorithm.kl_coef=0 stays 0. Set kl_coef=0.02, or "
    "kl_target=null.": {"algorithm.kl_target": 6, "algorithm.kl_coef": 0},
    "optimizer.weight_decay=100 takes away 200 of each weight per step at learning_rate=2; it must be less than all. Lower one "
    "of them.": {"algorithm.optimizer.weight_decay": 100, "algorithm.optimizer.learning_rate": 2.0},
    "stages.again.seed_offset=-4 makes the seed -1. It must be from 0 to 2**63 - 1.": {
        "seed": 3, "stages.again": {"algorithm": {"name": "sft"}, "policy": "new", "seed_offset": -4}},
}  # fmt: skip


@pytest.mark.parametrize("message", TOGETHER, ids=lambda message: message[:40])
def test_numbers_that_do_not_fit_each_other_are_refused(complete, message):
    config = complete
    for path, value in TOGETHER[message].items():
        config = changed(config, path, value)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Experiment(config)


# ---------------------------------------------------------------------------------------------------- keys of the root


ROOT = {
    "~seed": None, "~folder": None, "~checkpoint_every": None,  # the default stands in
    "folder=null": "folder=None should be str, not NoneType.",
    "seed=null": "seed=None should be int, not NoneType.",
    "objective=5": """objective=5 should be str, not int. For the text, type: objective="'5'\"""",
    "name=5": """name=5 should be str, not int. For the text, type: name="'5'\"""",
    "name=true": """name=True should be str, not bool. For the text, type: name="'True'\"""",
    "experiment_name=1e3": """experiment_name=1000.0 should be str, not float. For the text, type: experiment_name="'1000.0'\"""",
    "name=[a, b]": """name=['a', 'b'] should be str, not list. For the text, type: name="'[a, b]'\"""",
    "objective=ppo": "objective=ppo: it has no metric. It is stage/metric, as in evaluate/heldout/ppo/gold.",
    "objective=pppo/x": "objective=pppo/x: no stage 'pppo'. Did you mean 'ppo'?",
    "~stages": "Missing: stages. Set it on the command line or in YAML.",
    "stages=null": "stages=None should be a group of keys, not NoneType.",
    "stages=abc": "stages='abc' should be a group of keys, not str.",
    "stages=[a,b]": "Error merging override stages=[a,b]: Cannot merge DictConfig with ListConfig (at stages)",
    "stages.sft=abc": "stages.sft='abc' should be a group of keys, not str.",
    "stages.sft.algorithm=sft": "stages.sft.algorithm='sft' should be a group of keys, not str.",
    "+stages.x={algorithm: {name: 5}, policy: new}":
        "stages.x.algorithm is a component group, and needs a name: stages.x.algorithm.name=5.",
    "stages.ppo.reward_model={}": "reward_model is a component group, and needs a name: reward_model.name=None.",
    "~policy": "policy must be a component group, not None. Choose one by name, policy=NAME: decoder, huggingface, lora.",
    "policy=null": "policy=null: a group is chosen by the name of one of its files. There are: decoder, huggingface, lora.",
    "~backend": "backend must be a component group, not None. Choose one by name, backend=NAME: ",
    "backend=null": "backend=null: a group is chosen by the name of one of its files. There are: ",
    "data=5": "data=5: a group is chosen by the name of one of its files. There are: files, gymnasium, ",
    "~tracker": "tracker must be a component group, not None. Choose one by name, tracker=NAME: ",
    "backend.name=5": "backend is a component group, and needs a name: backend.name=5.",
    "~backend.name": "backend is a component group, and needs a name: backend.name=None.",
    "~reward_model": "stages.ppo.reward_model reads ${reward_model}, and the configuration has no reward_model.",
    "~experiment": "~experiment: a run has one, and leaves out what it need not do: ~stages.NAME. Or choose another. There are: ",
    "~algorithm": "~algorithm: a run has one, and leaves out what it need not do: ~stages.NAME. Or choose another. There are: ",
    "algorithm@algorithm=grpo": "algorithm@algorithm=grpo: to choose another file of algorithm, type: algorithm=grpo",
    "+reward_model=function": "+reward_model=function: to choose another file of reward_model, type: reward_model=function",
    "++policy=lora": "++policy=lora: to choose another file of policy, type: policy=lora",
    "+algorithm@sft=ppo": "+algorithm@sft=ppo: to choose another file of algorithm, type: algorithm@sft=ppo",
    "algorithm@ppo=grpo": "algorithm@ppo=grpo: no algorithm is chosen there. What can be chosen: algorithm, algorithm@pretrain, "
        "algorithm@sft, algorithm@reward.",
    "sft=ppo": "sft=ppo: the file of sft is chosen by algorithm@sft. Type: algorithm@sft=ppo",
    "reward_model={name: function, function: a}": "No key 'reward_model.function' in the chosen reward_model. It is a key of "
        "function: to choose a file and set its key, type: reward_model=function reward_model.function=...",
    "policy.path=x": "No key 'policy.path' in the chosen policy. It is a key of huggingface, lora: to choose a file and set "
        "its key, type: policy=huggingface policy.path=...",
    "algorithm.learning_rate=1": "No key 'algorithm.learning_rate'. It is a key of optimizer, value_optimizer: type "
    "algorithm.optimizer.learning_rate=...",
    "precision=bfloat16": "No key 'precision'. It is a key of backend: type backend.precision=...",
    "exeriment=demo": "No key 'exeriment'. Did you mean 'experiment'? ",
    "algorithm=GRPO": "No algorithm named 'GRPO'. Did you mean 'grpo'? ",
    "~stages.rewrad": "No key 'stages.rewrad'. Did you mean 'reward'? Keys of stages: evaluate, ppo, ppo_ptx, pretrain, ",
    "stages={a: 3}": "No key 'stages.a'. Keys of stages: evaluate, ppo, ppo_ptx, pretrain, reward, sft.",
}  # fmt: skip


@pytest.mark.parametrize("given", ROOT)
def test_a_root_group_that_is_removed_null_or_of_another_kind_is_named_with_what_to_type(given):
    try:
        config = compose([given])
        run_name(config), finished(config)
        Experiment(config)
    except LockstepError as error:
        assert ROOT[given] is not None and str(error).startswith(ROOT[given])
    else:
        assert ROOT[given] is None and config["seed"] == 0 and config["folder"] == "runs"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stages", [1], "stages=[1] should be a group of keys, not list."),
        ("stages", {1: {}}, "stages has the key 1, but its keys are text. Write '1' in quotes."),
        ("stages", {}, "The experiment has no stages. Choose one that has: experiment=instructgpt."),
        ("policy", "decoder", "policy must be a component group, not 'decoder'. Choose one by name, policy=NAME: "),
        ("reward", 3, "reward=3 should be a group of keys, not int."),
        ("evaluation", [], "evaluation=[] should be a group of keys, not list."),
        ("sft.schedule.shape", None, "sft.schedule.shape=None is not one of constant, linear, cosine."),
        ("stages.ppo_ptx.changes", {1: 2}, "stages.ppo_ptx.changes has the key 1, but its keys are text. Write '1' in quotes."),
        ("stages.ppo_ptx.changes", {"lengths": {1: 2}}, "Unknown key stages.ppo_ptx.changes.lengths.1."),
    ],
)
def test_in_yaml_and_in_python_the_root_is_checked_alike(complete, path, value, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        Experiment(changed(complete, path, value))


def refused(*overrides: str) -> str:
    with pytest.raises(LockstepError) as caught:
        Experiment(compose(overrides))
    return str(caught.value)


@pytest.mark.parametrize("given", ["+evalution={prompts: 3}", "+evalution.prompts=3", "+evalution=3", "+evalution=null"])
def test_an_unknown_key_of_the_root_suggests_the_nearest(given):
    said = refused(given)
    assert said.startswith("Unknown key evalution. Did you mean 'evaluation'? Known: algorithm, attack, attacker, backend, ")
    assert said.endswith("A key of your own must be read by another key, as ${evalution}.")


@pytest.fixture
def experiment_file(tmp_path, monkeypatch):
    """A function that puts an experiment file of a plugin onto the search path."""

    def write(text: str) -> None:
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
        monkeypatch.setitem(registry().conf, "mine", tmp_path)

    return write


def test_a_misspelt_group_in_an_experiment_file_is_refused(experiment_file):
    experiment_file("defaults: [instructgpt]\nexperiment_name: mine\nevalution: {prompts: 3}\n")
    assert refused("experiment=mine").startswith("Unknown key evalution. Did you mean 'evaluation'?")


@pytest.mark.parametrize("text", ["experiment_name: mine\n", "", "- a\n", "\ufeff# @package _global_\nseed: 1\n"], ids=repr)
def test_an_experiment_file_that_is_not_of_the_root_is_told_its_first_line(experiment_file, tmp_path, text):
    experiment_file("")
    (tmp_path / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")
    assert refused("experiment=mine").endswith("Its first line must be: # @package _global_")


def test_a_file_that_cannot_be_read_is_named(experiment_file, tmp_path):
    experiment_file("a: [")
    file = tmp_path / "experiment" / "mine.yaml"
    assert f'in "{file}", line 2, column 5' in refused("experiment=mine")
    file.write_bytes("# @package _global_\nexperiment_name: café\n".encode("latin-1"))
    assert refused("experiment=mine") == f"{file} is not UTF-8: invalid continuation byte."


def test_an_experiment_may_add_a_value_and_an_algorithm_that_other_keys_read(experiment_file):
    text = """
defaults: [instructgpt, /algorithm@again: sft]
experiment_name: mine
size: 16
again: {batch_size: "${size}"}
stages: {again: {algorithm: "${again}", policy: sft}}
"""
    experiment_file(text)
    assert Experiment(compose(["experiment=mine"])).stages["again"].config.batch_size == 16
    assert refused("experiment=mine", "+again.epoch=1").startswith("Unknown key stages.again.algorithm.epoch. Did you mean")
    assert refused("experiment=mine", "~stages.again").startswith("Unknown key again.")  # now nothing reads it


ONLY_SFT = {"only": {"algorithm": {"name": "sft"}, "policy": "new"}}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("pretrain.epoch", 1, "Unknown key pretrain.epoch. Did you mean 'epochs'?"),
        ("reward.optimizer.beta", 1, "Unknown key reward.optimizer.beta. Did you mean 'betas'?"),
        ("reward_model.sourse", "sft", "Unknown key reward_model.sourse. Did you mean 'source'?"),
        ("evaluation.prompt", 1, "Unknown key evaluation.prompt. Did you mean 'prompts'?"),
        ("tracker.tag", [], "Unknown key tracker.tag. Did you mean 'tags'?"),
        ("policy.layer", 1, "Unknown key policy.layer. Did you mean 'layers'?"),
        ("algorithm.name", "pppo", "No algorithm named 'pppo' for backend 'torch'. Did you mean 'ppo'?"),
        ("algorithm.name", None, "algorithm is a component group, and needs a name: algorithm.name=None."),
        ("stages.only.polcy", "new", "Unknown key stages.only.polcy. Did you mean 'policy'?"),
    ],
)
def test_a_group_is_checked_though_no_stage_uses_it(complete, path, value, message):
    with pytest.raises(LockstepError, match=f"^{re.escape(message)}"):
        Experiment(changed(complete | {"stages": ONLY_SFT}, path, value))


def test_an_unused_group_of_a_component_that_is_not_usable_here_is_left_alone(complete, monkeypatch):
    plugin = Plugin({"reward_model": {"elsewhere": "no.such:Thing"}}, requires=["no_such_library"], install="pip install it")
    monkeypatch.setattr(registry(), "components", dict(registry().components))
    registry().add(plugin, "test")
    registry().add(Plugin({"reward_model": {"theirs": "no.such:Thing"}}, backend="jax"), "test")
    for name in ("elsewhere", "theirs"):
        config = complete | {"reward_model": {"name": name}}
        Experiment(config | {"stages": ONLY_SFT})
        config["stages"] = {"ppo": complete["stages"]["ppo"] | {"reward_model": config["reward_model"]}}
        with pytest.raises(RegistryError, match=name):
            Experiment(config)


# ---------------------------------------------------------------------------------------------- other people's components


class TheirPPO(PPO):
    pass


def test_a_plugin_whose_file_is_older_than_a_key_works_and_has_its_default(experiment_file, tmp_path):
    """Its YAML is its own and complete as of some day; since then PPO and the optimizer have got new keys."""
    theirs = {key: value for key, value in group("algorithm", "ppo").items() if key not in ("correction", "stop_strings")}
    theirs["name"] = f"{__name__}:TheirPPO"
    del theirs["optimizer"]["ema_decay"]
    experiment_file("defaults: [instructgpt]\nexperiment_name: mine\n")
    (tmp_path / "algorithm").mkdir()
    (tmp_path / "algorithm" / "theirs.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(theirs)))
    config = Experiment(compose(["experiment=mine", "algorithm=theirs"])).stages["ppo"].config
    assert config == PPO.Config()


def test_a_config_that_inherits_may_add_a_key_of_its_own():
    @dataclass(frozen=True)
    class Config(TorchBackend.Config):
        deterministic: bool = setting(True, "The same bits from run to run.")

    assert parse(Config, {"threads": 1}, "backend") == Config(threads=1, deterministic=True)


# ---------------------------------------------------------------------------------------- one algorithm in place of another

EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


INSTEAD = ("policy_gradient", "preference_optimisation", "rejection_sampling")


def component_of(preset: str) -> str:
    """The component that a file of `conf/algorithm` chooses, itself or by the file that it starts from."""
    content = OmegaConf.load(CONF / "algorithm" / f"{preset}.yaml")
    return content.get("name") or component_of(content.defaults[0])


@pytest.mark.parametrize("number", range(len(EXPERIMENTS)), ids=EXPERIMENTS)
def test_every_algorithm_takes_the_place_of_ppo_in_every_experiment(number):
    experiment = EXPERIMENTS[number]
    for component in INSTEAD:
        presets = sorted(file.stem for file in (CONF / "algorithm").glob("*.yaml") if component_of(file.stem) == component)
        assert len(presets) <= len(EXPERIMENTS)  # so that over all experiments each is chosen; they have the same keys
        chosen = f"algorithm={presets[number % len(presets)]}"
        if experiment in ("shop", "library") and component == "preference_optimisation":
            continue  # it takes no environment, and says so
        checked = Experiment(compose([f"experiment={experiment}", chosen, *needed(experiment)]))
        stages = {"sums": "grpo", "rounds": "ppo_1", "feedback": "ppo_1", "red_team": "defender_1"}
        stage = stages.get(experiment, "rl" if experiment in ("rl", "shop", "library") else "ppo")
        assert checked.stages[stage].group["name"] == component and "ppo_ptx" not in checked.stages


def test_what_an_experiment_sets_for_one_algorithm_comes_before_the_command_line():
    assert compose(["experiment=demo"])["algorithm"]["kl_coef"] == 0.6
    assert compose(["experiment=demo", "algorithm.kl_coef=0.3"])["algorithm"]["kl_coef"] == 0.3
    assert compose(["experiment=demo", "algorithm=grpo"])["algorithm"] == group("algorithm", "grpo")
    assert compose(["experiment=hh", "algorithm=grpo", "policy.path=x"])["algorithm"]["optimizer"]["learning_rate"] == 3e-6


# --------------------------------------------------------------------------------------------------- the current folder's conf


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own('experiment/mine', text) writes ./conf/experiment/mine.yaml."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> None:
        file = tmp_path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return write


def test_experiments_and_presets_may_live_in_the_current_folder(own, capsys):
    own("experiment/mine", "# @package _global_\ndefaults: [instructgpt]\nexperiment_name: mine\nsft: {batch_size: 8}\n")
    own("experiment/mine/gentle", "kl_coef: 0.5\n")
    own("algorithm/gentle", "defaults: [grpo, _self_]\nclip_low: 0.1\n")
    config = compose(["experiment=mine", "algorithm=gentle"])
    assert (config["sft"]["batch_size"], config["algorithm"]["clip_low"], config["algorithm"]["kl_coef"]) == (8, 0.1, 0.5)
    assert refused("experiment=mien").startswith("No experiment named 'mien'. Did you mean 'mine'?")
    assert refused("experiment=mine", "algorithm=gentle", "algorithm.clipp_low=1").startswith(
        "No key 'algorithm.clipp_low'. Did you"
    )
    plugins.run(None, [])
    said = capsys.readouterr().out
    assert "./conf: algorithm=gentle, experiment=mine\n" in said and "experiment=demo, experiment=ensemble" in said


def test_a_file_that_extends_an_experiment_leaves_out_stages_by_null(own):
    own("experiment/mine", "# @package _global_\ndefaults: [instructgpt]\nexperiment_name: mine\nstages: {ppo_ptx: null}\n")
    assert [*compose(["experiment=mine"])["stages"]] == [*compose(["experiment=instructgpt", "~stages.ppo_ptx"])["stages"]]
    own("experiment/hardened", "# @package _global_\ndefaults: [hardening]\nstages: {rounds: {stages: {labels: null}}}\n")
    inside, whole = (compose([f"experiment={name}"])["stages"]["rounds"]["stages"] for name in ("hardened", "hardening"))
    assert [*inside] == [name for name in whole if name != "labels"]


def test_a_misspelt_key_of_an_experiment_for_one_algorithm_is_an_error(own):
    own("experiment/mine", "# @package _global_\ndefaults: [instructgpt]\nexperiment_name: mine\n")
    own("experiment/mine/ppo", "kl_coeff: 0.5\n")
    assert "kl_coeff" in refused("experiment=mine") and "Did you mean 'kl_coef'?" in refused("experiment=mine")


def test_the_current_folder_replaces_no_launcher_that_a_package_registers(own):
    own("hydra/launcher/processes", "_target_: os.system\n")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", return_hydra_config=True)
    assert composed.hydra.launcher._target_ == "hydra_plugins.lockstep_launcher.ProcessLauncher"


def test_a_file_of_the_current_folder_with_a_packages_name_is_refused_only_when_it_is_chosen(own):
    own("experiment/demo", "# @package _global_\ndefaults: [instructgpt]\nexperiment_name: mine\n")
    own("algorithm/ppo", "somebody: elses\n")
    own("config", "not: ours\n")
    assert compose([])["algorithm"]["name"] == "ppo"
    assert refused("experiment=demo") == (
        "experiment=demo is ./conf/experiment/demo.yaml and a file of lockstep-rlhf (core). Rename yours."
    )
    own("experiment/demo", (CONF / "experiment" / "demo.yaml").read_text())
    assert compose(["experiment=demo"])["experiment_name"] == "demo"


def test_a_component_without_a_config_is_told_to_have_one():
    class Sure:
        """Somebody's environment, whose author did not read on."""

    with pytest.raises(ConfigError, match=r"Sure has no Config. Give it one: a frozen dataclass with its keys, or a ready one"):
        component_config(Sure, {"name": "sure:Sure"}, "environment")


def test_a_file_with_the_name_of_a_component_must_name_it(own, monkeypatch):
    """Else the component of its defaults would be used."""
    found = Component("algorithm", "mine", None, "lockstep_rlhf.algorithms.ppo:PPO", "mine (plug)", None)
    monkeypatch.setitem(registry().components, ("algorithm", "mine", None), found)
    own("algorithm/mine", "defaults: [ppo, _self_]\nkl_coef: 0.5\n")
    assert refused("experiment=demo", "algorithm=mine") == (
        "algorithm=mine: the file algorithm/mine.yaml names algorithm 'ppo', and mine (plug) registers 'mine'. Write in the "
        "file, after its defaults: name: mine"
    )
    own("algorithm/mine", "defaults: [ppo, _self_]\nname: mine\n")
    assert compose(["experiment=demo", "algorithm=mine"])["algorithm"]["name"] == "mine"
    assert compose(["experiment=demo", "algorithm=mine", "algorithm.name=a:B"])["algorithm"]["name"] == "a:B"


def test_a_key_of_what_is_read_from_elsewhere_is_said_there():
    assert refused("experiment=rl", "policy.path=x", "algorithm.lengths.prompt=32") == (
        "algorithm.lengths is ${lengths}, for all that read it: type lengths.prompt=..."
    )
    told = refused("policy.layers=1", "policy.hidden_size=32", "policy=huggingface", "policy.path=x")
    assert told.startswith("No key 'policy.layers' in the chosen policy. It is a key of decoder")
