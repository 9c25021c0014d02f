"""Who supplies what: how components are found, and what is said when they are not."""

import abc
import importlib.metadata
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lockstep.errors import RegistryError
from lockstep.registry import Plugin, Registry, registry


def plugin(kind="algorithm", backend=None, install="", requires=(), **components):
    return Plugin({kind: components}, backend=backend, requires=requires, install=install)


@pytest.fixture
def found():
    """ppo for every backend and fused for torch, pppo is a typo of the former."""
    registry = Registry()
    registry.add(plugin(ppo="collections:OrderedDict", dpo="collections:Counter"), "lockstep-rlhf (rlhf)")
    registry.add(plugin(backend="torch", ppo="collections:deque", fused="collections:ChainMap"), "fast (kernels)")
    return registry


def message(call, *arguments):
    with pytest.raises(RegistryError) as caught:
        call(*arguments)
    return str(caught.value)


def test_the_exact_backend_beats_the_neutral_component(found):
    assert found.resolve("algorithm", "ppo", "torch").__name__ == "deque"
    assert found.resolve("algorithm", "ppo", "jax").__name__ == "OrderedDict"
    assert found.resolve("algorithm", "ppo").__name__ == "OrderedDict"


def test_an_unknown_name_suggests_the_nearest_and_lists_all(found):
    assert message(found.resolve, "algorithm", "pppo", "torch") == (
        "No algorithm named 'pppo' for backend 'torch'. Did you mean 'ppo'? Registered for backend 'torch': dpo, fused, ppo. "
        "To use a class of your own, register an algorithm plugin or write 'algorithm.name=module:Class'."
    )


def test_a_name_of_another_backend_says_where_it_exists(found):
    text = message(found.resolve, "algorithm", "fused", "jax")
    assert "Registered for backend 'jax': dpo, ppo. 'fused' exists for backend torch." in text


def test_a_name_like_no_other_suggests_nothing(found):
    text = message(found.resolve, "tracker", "zzz")
    assert text.startswith("No tracker named 'zzz'. Registered: none.") and "register a tracker plugin" in text


@pytest.mark.parametrize(("backend", "scope"), [(None, "every backend"), ("torch", "torch")])
def test_a_name_registered_twice_names_both_distributions(found, backend, scope):
    text = message(found.add, plugin(backend=backend, ppo="collections:UserDict"), "mine (plug)")
    owner = "fast (kernels)" if backend else "lockstep-rlhf (rlhf)"
    assert text == f"Both {owner} and mine (plug) register the algorithm 'ppo' for {scope}. Rename one, or uninstall one."
    assert found.resolve("algorithm", "ppo", backend).__name__ != "UserDict"


def test_the_same_name_for_another_backend_or_kind_is_no_duplicate(found):
    found.add(plugin(backend="jax", ppo="collections:UserDict"), "mine")
    found.add(plugin(kind="data", ppo="collections:UserList"), "mine")
    assert found.resolve("algorithm", "ppo", "jax").__name__ == "UserDict"


def test_an_unknown_kind_names_its_distribution_and_the_nearest_kind():
    assert message(Registry().add, plugin(kind="algoritm", ppo="x:Y"), "mine (plug)") == (
        "mine (plug) registers components of kind 'algoritm'. Did you mean 'algorithm'? "
        "Kinds: backend, policy, reward_model, environment, engine, labeler, attacker, algorithm, data, tracker."
    )


def test_module_and_object_in_place_of_a_name_need_no_registration():
    assert Registry().resolve("algorithm", "collections:OrderedDict", "torch").__name__ == "OrderedDict"
    assert Registry().resolve("data", "importlib.metadata:EntryPoint.matches").__name__ == "matches"


@pytest.mark.parametrize("target", ["no_such_module:Thing", "collections:NoSuchThing"])
def test_a_target_that_cannot_be_imported_gives_the_reason_and_the_owner(target):
    found = Registry()
    found.add(plugin(mine=target), "mine (plug)")
    text = message(found.resolve, "algorithm", "mine")
    assert text.startswith(f"The algorithm 'mine' of mine (plug) ({target}) cannot be imported: ")
    assert "No module named 'no_such_module'" in text or "NoSuchThing" in text


def test_a_missing_requirement_gives_the_command_that_installs_it():
    found = Registry()
    requires = ("no_such_module", "numpy", "nor_this_one")
    found.add(plugin(mine="collections:OrderedDict", requires=requires, install="pip install 'mine[all]'"), "mine (plug)")
    assert message(found.resolve, "algorithm", "mine") == (
        "The algorithm 'mine' of mine (plug) needs no_such_module, nor_this_one, not installed. Type: pip install 'mine[all]'"
    )
    assert [c.missing() for c in found] == [["no_such_module", "nor_this_one"]]


# ------------------------------------------------------------------------------------------------------- entry points


def entry(name, load, distribution="mine"):
    return SimpleNamespace(name=name, value=f"{name}:plugin", dist=SimpleNamespace(name=distribution), load=load)


@pytest.fixture
def discover(monkeypatch):
    """discover(entries): what the registry finds in them."""

    def build(*entries):
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries if group == "lockstep.plugins" else ())
        return registry.__wrapped__()

    return build


@pytest.mark.parametrize("ending", [SystemExit(3), SystemExit(), GeneratorExit(), RuntimeError("x")], ids=repr)
def test_a_manifest_that_exits_breaks_no_other(discover, ending):
    def exits():
        raise ending

    found = discover(entry("bad", exits), entry("good", lambda: plugin(mine="collections:OrderedDict")))
    assert found.broken == {"mine (bad)": repr(ending)}
    assert found.resolve("algorithm", "mine").__name__ == "OrderedDict"


def test_ctrl_c_while_a_manifest_is_read_is_no_fault_of_it(discover):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        discover(entry("slow", interrupted))


def broken():
    raise ImportError("no module named spam")


def test_a_broken_manifest_is_listed_with_its_reason_and_does_not_break_the_rest(discover):
    found = discover(entry("bad", broken, "theirs"), entry("good", lambda: plugin(ppo="collections:OrderedDict")))
    assert found.resolve("algorithm", "ppo").__name__ == "OrderedDict"
    assert found.broken == {"theirs (bad)": "ImportError('no module named spam')"}
    assert "Not loaded: theirs (bad): ImportError('no module named spam')." in message(found.resolve, "algorithm", "spam")


def test_manifests_that_contradict_each_other_are_an_error_that_names_both(discover):
    both = [entry(name, lambda: plugin(ppo="collections:OrderedDict"), f"dist-{name}") for name in ("a", "b")]
    assert "Both dist-a (a) and dist-b (b) register the algorithm 'ppo'" in message(discover, *both)


def test_an_entry_point_that_is_no_manifest_is_listed_as_broken(discover):
    assert "mine (odd)" in discover(entry("odd", lambda: SimpleNamespace())).broken


def test_a_manifests_conf_folder_is_known_by_its_distribution(discover):
    found = discover(entry("good", lambda: Plugin({}, conf=Path("/somewhere/conf"))))
    assert found.conf == {"mine (good)": Path("/somewhere/conf")}


def test_components_are_listed_by_kind_then_name(found):
    found.add(plugin(kind="backend", torch="x:Y"), "mine")
    assert [(c.kind, c.name, c.backend) for c in found] == [
        ("backend", "torch", None),
        ("algorithm", "dpo", None),
        ("algorithm", "fused", "torch"),
        ("algorithm", "ppo", None),
        ("algorithm", "ppo", "torch"),
    ]


def test_what_is_installed_here_registers_without_conflict():
    assert {"ppo", "sft", "reward_modelling", "pretrain"} <= {c.name for c in registry() if c.kind == "algorithm"}
    assert registry().broken == {}


def test_importing_lockstep_and_every_manifest_imports_neither_torch_nor_jax():
    code = (
        "import sys, lockstep, lockstep.cli, lockstep.runs.runner, lockstep.learning.losses, lockstep.learning.numerics\n"
        "from lockstep.registry import registry\n"
        "assert list(registry()) and not registry().broken\n"
        "import lockstep_rlhf.algorithms.ppo, lockstep_rlhf.algorithms.reward_modelling\n"
        "from lockstep_rlhf.reward_models import endpoint, ensemble, function, learned\n"
        "print(sorted({'torch', 'jax', 'transformers', 'tensorflow'} & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


class Base(abc.ABC):
    @abc.abstractmethod
    def score(self): ...

    def advantages(self): ...


class Misspelt(Base):
    def score(self): ...

    def advantage(self): ...

    def helper(self): ...


class Lacking(Base):
    def scores(self): ...


def test_a_method_that_nothing_calls_is_warned_of_if_it_is_nearly_a_hook(caplog):
    with caplog.at_level(logging.WARNING):
        Registry().resolve("algorithm", f"{__name__}:Misspelt")
    assert "has a method 'advantage', which nothing calls. Did you mean 'advantages'?" in caplog.text
    assert "helper" not in caplog.text


def test_a_class_without_a_method_of_its_kind_is_refused_before_it_is_used():
    assert message(Registry().resolve, "reward_model", f"{__name__}:Lacking").endswith(
        "lacks score, which its kind must have. It has scores."
    )


def test_no_component_here_has_a_method_that_is_nearly_a_hook(caplog):
    with caplog.at_level(logging.WARNING):
        for component in registry():
            if not component.missing():
                component.load()
    assert "which nothing calls" not in caplog.text


def test_a_component_whose_module_is_not_there_is_not_usable():
    found = Registry()
    found.add(plugin(mine="no_such_module:Thing", other="collections.none:Thing", here="collections:OrderedDict"), "mine (plug)")
    lacking = {component.name: component.lacking() for component in found}
    no = "no: there is no module"
    assert lacking == {"mine": f"{no} no_such_module", "other": f"{no} collections.none", "here": ""}
