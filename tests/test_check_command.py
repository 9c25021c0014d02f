"""`lockstep check`, and the same checks as a package's own tests by the pytest plugin."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from lockstep.checking.conformance.kit import Check, Outcome, checks, conform
from lockstep.checking.conformance.report import (
    PRECISIONS,
    Place,
    kind_of,
    known_precisions,
    line,
    places,
    processes,
    report,
    summary,
)
from lockstep.checking.conformance.subjects import subject
from lockstep.cli import main
from lockstep.config.schema import REQUIRED, setting
from lockstep.errors import ConfigError, LockstepError
from lockstep_rlhf.algorithms.ppo import PPO

pytest_plugins = ["pytester"]
pytest.importorskip("torch")

ROUNDED = "defects.reward_models:RoundedFunction"


def outcome(name: str, status: str, detail: str = "") -> Outcome:
    def holds(subject):
        """Two and two
        are four."""

    return Outcome(Check("algorithm", name, holds, "arithmetic"), status, detail, 0.1)


# ----------------------------------------------------------------------------------------------------------- in the terminal


def test_a_component_that_conforms_has_a_line_for_each_check_and_one_at_the_end(capsys):
    assert report("function", backend="torch", overrides=["backend.threads=1"])
    first, given, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "reward_model function on torch, float32"
    assert given.startswith("  with ") and "policy.layers=2" in given and "backend.threads=1" in given and "/tmp" not in given
    lines = [each for each in lines if not each.startswith("  with ")]
    assert lines.count("  ✓ padding_is_inert") == 2 and "reward_model function on torch, bfloat16" in lines
    assert sum(each.startswith("  ") for each in lines) == 2 * len(checks("reward_model"))
    assert last == "function conforms on torch, float32 and bfloat16: 7 checks passed, 4 do not apply"


def test_a_failure_has_the_property_the_numbers_and_what_it_usually_means(capsys):
    assert not report(ROUNDED, "reward_model", "torch", "float32", like="function")
    said = capsys.readouterr().out
    assert "  ✗ fractions_survive\n      A score of 0.73 stays 0.73 (invariant 11).\n      found: scores: " in said
    assert "the difference 0." in said
    assert "      usually: scores were stored in an array with the token ids' dtype: 0.73 becomes 0\n" in said
    assert said.splitlines()[-1] == (
        f"{ROUNDED} does not conform on torch, float32: 1 failed (fractions_survive), 6 checks passed, 4 do not apply"
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["torch", "decoder"])
def test_the_kit_passes_on_two_processes_which_it_starts(name):
    backend = [] if name == "torch" else ["--backend", "torch"]
    command = ["check", name, *backend, "--precision", "float32", "backend.device=cpu", "backend.mesh.fsdp=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-P", "-m", "lockstep", *command], env=environment, capture_output=True, text=True, timeout=500
    )
    last = found.stdout.splitlines()[-1]
    assert found.returncode == 0 and last.startswith(f"{name} conforms on torch, float32: "), found.stdout + found.stderr
    assert name != "torch" or "28 checks passed" in last


def test_backends_that_need_other_numbers_of_processes_are_checked_one_at_a_time():
    given = ["backend.device=cpu", "backend.mesh.fsdp=2"]
    assert processes("decoder", backend="torch", overrides=given) == 2
    assert processes("decoder", backend="torch", overrides=["backend.threads=1"]) == 1
    with pytest.raises(ConfigError, match=r"processes \(torch: 2, jax: 1\). Add --backend with one of jax, torch"):
        processes("decoder", overrides=given)


def test_the_checks_of_a_mesh_say_what_they_need():
    def reasons(*axes):
        world = subject("backend", "torch", "torch", overrides=["backend.device=cpu", *axes])
        return {outcome.detail for outcome in conform("backend", world, lambda check: "mesh" in check.name)}

    assert reasons() == {"it runs on one device. Add, say, backend.mesh.fsdp=2"}
    assert reasons("backend.mesh.data=3") == {"it needs 3 processes, which `lockstep check` starts"}


@pytest.mark.parametrize("conforms", [True, False])
def test_the_exit_code_says_whether_it_conforms(conforms, monkeypatch):
    given = []
    monkeypatch.setattr("lockstep.checking.conformance.report.report", lambda *arguments: given.append(arguments) or conforms)
    monkeypatch.setattr(sys, "argv", ["lockstep", "check", "ppo", "--backend", "torch", "algorithm.epochs=3"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == (0 if conforms else 1)
    assert given == [("ppo", None, "torch", None, None, ["algorithm.epochs=3"], False)]


def test_a_check_that_does_not_apply_says_why():
    assert line(outcome("stops", "inapplicable", "it does not sample")) == "  – stops: it does not sample"


def test_an_error_in_a_check_has_its_traceback_if_asked_for():
    def raises(subject):
        """It holds."""
        return subject["nothing"]

    check = Check("algorithm", "raises", raises, "a bug")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lockstep.checking.conformance.kit.checks", lambda kind: [check])
        (found,) = conform("algorithm", {})
    assert found.status == "failed" and found.detail == "it raised KeyError: 'nothing'"
    assert "Traceback" not in line(found)
    assert 'return subject["nothing"]' in line(found, verbose=True)
    assert "a bug" not in line(found)  # the check knows what its numbers mean, not what went wrong elsewhere
    assert line(found, again=True) == "  ✗ raises: the same error"


def test_the_property_of_a_failure_is_one_line():
    assert line(outcome("adds_up", "failed", "2 + 2 = 5")).splitlines()[1:] == [
        "      Two and two are four.",
        "      found: 2 + 2 = 5",
        "      usually: arithmetic",
    ]


def test_a_check_counts_once_and_as_failed_if_it_failed_anywhere():
    where = [Place(backend, precision) for backend in ("torch", "jax") for precision in PRECISIONS]
    one = [outcome("a", "passed"), outcome("b", "passed"), outcome("c", "inapplicable")]
    assert summary("ppo", where, one * 4) == (
        "ppo conforms on torch and jax, float32 and bfloat16: 2 checks passed, 1 does not apply"
    )
    other = [outcome("a", "failed", "1 is not 2"), outcome("b", "inapplicable"), outcome("c", "inapplicable")]
    assert summary("ppo", where[:2], one + other) == (
        "ppo does not conform on torch, float32 and bfloat16: 1 failed (a), 1 check passed, 1 does not apply"
    )
    assert summary("x", [Place("numpy", None)], one[:1]) == "x conforms on numpy: 1 check passed"


# --------------------------------------------------------------------------------------------------------- what is checked


def test_the_kind_is_found_by_the_name():
    assert [kind_of(name) for name in ("ppo", "function", "decoder", "torch")] == [
        "algorithm", "reward_model", "policy", "backend",
    ]  # fmt: skip


def test_a_component_is_checked_wherever_it_runs():
    assert Place("torch", "float32") in places("algorithm", "ppo") and Place("torch", "bfloat16") in places("algorithm", "ppo")
    assert places("backend", "torch") == [Place("torch", "float32"), Place("torch", "bfloat16")]
    assert places("policy", "decoder", ["torch"], ["bfloat16"]) == [Place("torch", "bfloat16")]


def test_a_backend_is_asked_only_for_precisions_that_it_knows(monkeypatch):
    from lockstep_torch.backend import TorchBackend

    assert known_precisions("backend", "torch", "torch") == ["float32", "bfloat16"]
    monkeypatch.setitem(TorchBackend.Config.__annotations__, "precision", "Literal['float32']")
    assert places("algorithm", "ppo", ["torch"]) == [Place("torch", "float32")]
    with pytest.raises(LockstepError, match="There is no precision bfloat16 on torch: torch has float32."):
        places("algorithm", "ppo", ["torch"], ["bfloat16"])
    monkeypatch.delitem(TorchBackend.Config.__annotations__, "precision")
    assert places("algorithm", "ppo", ["torch"]) == [Place("torch", None)]


class Needy(PPO):
    @dataclass(frozen=True, kw_only=True)
    class Config(PPO.Config):
        quorum: int = setting(REQUIRED, "What nobody gives.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pppo"], r"No component named 'pppo' to check. Did you mean 'ppo'\? There are: .*, ppo, .*Class --kind algorithm"),
        (["files"], r"'files' is of kind data, which has no checks. Kinds with checks: backend, policy, "),
        (["ppo", "policy"], r"No policy named 'ppo' to check. 'ppo' is of kind algorithm. There are: decoder, huggingface"),
        (["ppo", "algo"], r"There are no checks for the kind 'algo'."),
        (["my_module:PPO"], r"What kind is my_module:PPO\? Add --kind with one of backend, policy, reward_model, environment,"),
        (["ppo", None, "torhc"], r"No backend named 'torhc'. Did you mean 'torch'\? There are: .*torch."),
        (["torch", None, "jax"], r"'torch' is a backend. Leave out --backend, or type: lockstep check jax"),
        (["nowhere:PPO", "algorithm", "torch"], r"The algorithm 'nowhere:PPO' .* cannot be imported: ModuleNotFoundError"),
        (
            [f"{__name__}:Needy", "algorithm", "torch", "float32"],
            r"Missing: algorithm.quorum. .* There is no configuration file algorithm/test_check_command:Needy.yaml to start "
            r"from. Add --like with one of .*ppo, .*pretrain, .*, and algorithm.key=value for what differs.",
        ),
        (
            ["ppo", None, None, None, None, ["algorithms.epochs=3"]],
            r"'algorithms.epochs=3' is not a setting of a check. Did you mean 'algorithm'\? Write group.key=value",
        ),
        (["ppo", None, None, None, None, ["algorithm.epochs"]], r"'algorithm.epochs' is not a setting of a check."),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_said_with_what_to_type(arguments, message):
    with pytest.raises(LockstepError, match=message):
        report(*arguments)


def test_a_name_of_two_kinds_asks_for_the_kind(monkeypatch):
    from lockstep.registry import Component, registry

    monkeypatch.setitem(
        registry().components, ("policy", "ppo", "torch"), Component("policy", "ppo", "torch", "a:B", "mine", None)
    )
    with pytest.raises(LockstepError, match="'ppo' is an algorithm and a policy. Add --kind algorithm or --kind policy."):
        kind_of("ppo")
    assert kind_of("ppo", "policy") == "policy"


def test_a_backend_that_is_not_installed_comes_with_the_command_that_installs_it(monkeypatch):
    from lockstep.registry import Component, Plugin, registry

    for component in [c for c in registry() if c.kind == "backend"]:
        monkeypatch.delitem(registry().components, ("backend", component.name, component.backend))
    plugin = Plugin({}, requires=("no_such_library",), install="pip install no-such-library")
    key = ("backend", "abacus", "abacus")
    monkeypatch.setitem(registry().components, key, Component(*key, "a:B", "mine", plugin))
    with pytest.raises(LockstepError, match="The algorithm 'ppo' runs on no installed backend. Type: pip install no"):
        places("algorithm", "ppo")


# ------------------------------------------------------------------------------------------------------------- with pytest


def said(pytester, mark: str, *options: str) -> pytest.RunResult:
    """Of pytest on a module with one test that has this mark."""
    pytester.makepyfile(test_mine=f"import pytest\n\n{mark}\ndef test_conformance(conformance):\n    conformance()\n")
    return pytester.runpytest_inprocess("--strict-markers", "-p", "no:cacheprovider", *options)


def test_there_is_a_test_for_each_backend_precision_and_check(pytester):
    result = said(pytester, '@pytest.mark.conformance("reward_model", "function", backends=["torch"])', "-v", "-rs")
    result.assert_outcomes(passed=14, skipped=8)
    result.stdout.fnmatch_lines([
        "*::test_conformance?torch-float32-fractions_survive? PASSED*",
        "*::test_conformance?torch-bfloat16-the_value_network_is_a_copy? SKIPPED*",
        "SKIPPED*it has no network to start a value network from*",
    ])  # fmt: skip


def test_a_failure_is_told_without_a_traceback(pytester):
    mark = (
        f'@pytest.mark.conformance("reward_model", "{ROUNDED}", backends=["torch"], precisions=["float32"], like="function", '
        'overrides=["backend.threads=1"])'
    )
    result = said(pytester, mark)
    result.assert_outcomes(passed=6, failed=1, skipped=4)
    result.stdout.fnmatch_lines([
        "A score of 0.73 stays 0.73 (invariant 11).",
        "found: scores: * the difference 0.* is above 1e-05",
        "usually: scores were stored in an array with the token ids' dtype: 0.73 becomes 0",
    ])  # fmt: skip
    result.stdout.no_fnmatch_line("*Violation*")


def test_the_subject_is_made_once_for_all_checks_of_a_place(pytester, monkeypatch):
    from lockstep.checking.conformance import report as module

    made, real = [], module.subject
    monkeypatch.setattr(module, "subject", lambda *a, **k: made.append(k["precision"]) or real(*a, **k))
    said(pytester, '@pytest.mark.conformance("reward_model", "function", backends=["torch"])')
    assert made == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("", '*test_conformance names no component. Put @pytest.mark.conformance("algorithm", "NAME") above it.'),
        ('@pytest.mark.conformance("algorithm", "pppo")', "*No algorithm named 'pppo' to check. Did you mean 'ppo'?*"),
        ('@pytest.mark.conformance("algorithm")', "*TypeError*missing 1 required positional argument: 'name'*"),
    ],
)
def test_a_mark_that_says_not_what_to_check_is_an_error_of_one_line(pytester, mark, message):
    result = said(pytester, mark)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_loading_the_plugin_loads_nothing_else():
    script = (
        "import sys, lockstep.checking.pytest_plugin\n"
        "found = {'torch', 'jax', 'numpy', 'hydra', 'lockstep.checking.conformance', 'lockstep_torch'} & sys.modules.keys()\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
