"""A world small enough to check by hand: 37 words, a two-layer decoder with weights as large as trained ones, data that
is written out here, and a reward model that is a function. Nothing in it knows the array library."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers

from lockstep.config.schema import parse
from lockstep.errors import MissingData
from lockstep.interfaces import Algorithm, Backend, Context, DataSource, Policy, RewardModel, ScalarModel
from lockstep.models.architecture import initial_parameters, small_decoder, to_hf
from lockstep.registry import registry
from lockstep.storage.files import write_json
from lockstep.storage.weights import write_tensors
from lockstep.text.encoding import Lengths
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Comparison, Demonstration, Prompt
from lockstep_rlhf.reward_models.learned import Learned

# Programs that run for milliseconds: compiled in a small part of the time, to code a few times slower. Read by XLA when its
# first device is made, which importing jax does not do; inherited by the processes that tests start.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# Four devices, for those tests that use several.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION} --xla_force_host_platform_device_count=4"

# Each of pytest's workers has a core of its own. Two threads in each of two workers are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# One folder of compiled programs per session: what one worker has compiled, the other loads. Workers inherit the variable.
if "LOCKSTEP_TESTS_COMPILED" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="lockstep-tests-")  # removed when this process ends
    os.environ["LOCKSTEP_TESTS_COMPILED"] = _compiled.name

with contextlib.suppress(ImportError):
    import lockstep_jax.device

    # One heap for all threads makes programs run faster and compile slower, by a quarter; here they compile more than they run.
    lockstep_jax.device._mallopt = lambda option, value: False
    _keep = lockstep_jax.device._keep_compiled_programs
    lockstep_jax.device._keep_compiled_programs = lambda folder: _keep(os.environ["LOCKSTEP_TESTS_COMPILED"])

BACKENDS = {
    "torch": {"device": "cpu", "precision": "float32", "gradient_checkpointing": False, "cuda_graphs": False, "threads": 1},
    "jax": {"device": "cpu", "precision": "float32", "gradient_checkpointing": False, "compilation_cache": None},
}
CONSTANT = {"shape": "constant", "warmup_steps": 0}
WORDS = [f"w{i}" for i in range(34)]
ARCHITECTURE = small_decoder(
    vocab_size=37, hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, context_length=64,
    rope_theta=100.0, tied=False,
)  # fmt: skip


@pytest.fixture(scope="session", params=["torch", "jax"])
def backend(request) -> Backend:
    pytest.importorskip(request.param)
    cls = registry().resolve("backend", request.param, request.param)
    return cls(parse(cls.Config, BACKENDS[request.param], "backend"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Word-level. It stops at <stop>; <eos> is a word like any other."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate([*WORDS, "<eos>", "<stop>", "<pad>"])}))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<stop>", "<pad>"])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return Tokenizer(core, eos_token="<stop>", pad_token="<pad>", chat_template=template)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Checkpoints of two different policies of the same shape."""
    paths = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"policy{seed}")
        parameters = initial_parameters(ARCHITECTURE, seed)
        write_tensors(folder / "model.safetensors", {n: p * (10 if p.ndim > 1 else 1) for n, p in parameters.items()})
        write_json(folder / "config.json", to_hf(ARCHITECTURE))
        paths.append(folder)
    return paths


@pytest.fixture
def load(backend, folders) -> Callable[..., Policy]:
    """load(0) and load(1): fresh copies of the two policies."""
    cls = registry().resolve("policy", "decoder", backend.name)
    return lambda number=0: cls.load(folders[number], backend)


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Linux gives a process 65,530 mappings of memory; each program that XLA compiles for a CPU takes some, and JAX keeps
    them all. Where they run out, the next compilation is a segmentation fault, as one process of this suite found."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        sys.modules["jax"].clear_caches()


class Data(DataSource):
    """Twelve of everything, of different lengths."""

    rows = 12

    def texts(self, split: str) -> list[str]:
        return [sentence(100 + i, 3 + i % 5) for i in range(self.rows)]

    def demonstrations(self, split: str) -> list[Demonstration]:
        return [Demonstration(p, sentence(200 + i, 1 + i % 6)) for i, p in enumerate(self.prompts(split))]

    def comparisons(self, split: str) -> list[Comparison]:
        ranks = [(1, 0), (0, 1, 2), (2, 0, 1, 0), (0, 1)]
        return [
            Comparison(p, tuple(sentence(300 + 10 * i + k, 1 + (i + k) % 6) for k in range(len(r))), r)
            for i, (p, r) in enumerate(zip(self.prompts(split), ranks * 3, strict=True))
        ]

    def prompts(self, split: str) -> list[Prompt]:
        return [Prompt.of(sentence(i, 2 + i % 5)) for i in range(self.rows)]


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines (a string as it is) and gives the source."""

    def write(*rows, name="my.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return {"path": str(path)}

    return write


class NoTexts(Data):
    def texts(self, split: str) -> list[str]:
        raise MissingData("no texts")


def sentence(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


class Scored(RewardModel):
    """``function(responses) -> scores``, and a network that a value network may start from."""

    def __init__(
        self, function: Callable[..., Any] = lambda r: r.sequences.mask.sum(axis=1) - 5.0, network: ScalarModel | None = None
    ):
        self.function, self.network = function, network

    def score(self, responses):
        return np.asarray(self.function(responses), np.float32)

    def value_network(self):
        return None if self.network is None else self.network.copy()


def head(seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, ARCHITECTURE.hidden_size).astype(np.float32)


def configure(name: str, **changes: Any) -> tuple[type[Algorithm], Any]:
    """An algorithm's class and its configuration: the defaults with ``changes``, cut to the size of this world."""
    cls = registry().resolve("algorithm", name)
    return cls, parse(cls.Config, changes, "algorithm", cls.Config(lengths=Lengths(6, 12, 4)))


@pytest.fixture
def make(backend, tokenizer, load) -> Callable[..., Algorithm]:
    """make('ppo', epochs=2, reward_model=..., data=...): an algorithm on policy 0. Other policies that it names are policy 1."""

    def build(name: str, *, reward_model: RewardModel | None = None, data: DataSource | None = None, policy: Policy | None = None,
              tokenizer: Tokenizer = tokenizer, seed: int = 0, engine: Any = None, **changes: Any) -> Algorithm:  # fmt: skip
        cls, config = configure(name, **changes)
        policy = policy or load()
        others = SimpleNamespace(policy=lambda source: (load(1), tokenizer))
        given = seed, backend, tokenizer, data or Data(), policy, reward_model
        return cls(config, Context(*given, resources=others, engine=engine))

    return build


@pytest.fixture
def learned(load, tokenizer):
    """A learned reward model that reads the policy's tokens."""
    model = load(1).scalar_model(head())
    return made_by_a_stage(model, tokenizer, tokenizer)


def made_by_a_stage(model, own: Tokenizer, policys: Tokenizer) -> Learned:
    """The reward model around a network and its tokenizer, for a policy with another tokenizer or the same."""
    resources = SimpleNamespace(tokenizer=policys, kind=lambda source: "stage", scalar_model=lambda source: (model, own))
    return Learned(Learned.Config(source="reward", micro_batch_size=None, chat_template=None), resources)


def spy(algorithm, monkeypatch):
    """The calls of learner.update, which still happen."""
    calls, update = [], algorithm.learner.update
    monkeypatch.setattr(
        algorithm.learner, "update", lambda terms, scale=1.0: calls.append((terms, scale)) or update(terms, scale)
    )
    return calls


def gradients(algorithm, rollout, batch):
    return algorithm.learner.gradients(algorithm.terms(rollout.sequences, batch, np.arange(len(batch["mask"]))))


def same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        if tolerance:
            np.testing.assert_allclose(one[name], other[name], err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def relative(one, other):
    """The largest difference between two sets of gradients, over the largest entry."""
    return max(abs(one[n] - other[n]).max() for n in one) / max(abs(g).max() for g in one.values())
