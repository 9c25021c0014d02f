"""A world small enough to check by hand: 37 words, a two-layer decoder with weights as large as trained ones, data written
out here, and a function as reward model. None of it depends on a backend's array library.

Fresh weights would hide mistakes: with a standard deviation of 0.02, every logit is near 0 and a wrong mask moves the result
by less than rounding. So matrices are ten times as large.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from omegaconf import OmegaConf

from lockstep.checking.conformance.kit import Inapplicable
from lockstep.config import compose
from lockstep.config.overrides import override
from lockstep.config.schema import parse
from lockstep.errors import ConfigError
from lockstep.interfaces import Backend, DataSource, Environment, Episode, Policy, Reply, RewardModel, ScalarModel
from lockstep.launchers import LAUNCHERS
from lockstep.learning import randomness
from lockstep.models import adapters
from lockstep.models.architecture import Architecture, initial_parameters, small_decoder, to_hf
from lockstep.processes import ALONE
from lockstep.registry import registry
from lockstep.storage.files import write_json
from lockstep.storage.weights import read_tensors, write_tensors
from lockstep.text.sequences import Sequences, left_pad, pack
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Comparison, Demonstration, Message, Prompt, Role

WORDS = [f"w{i}" for i in range(34)]
LAST = ["[aeiou]", "[dty]", "[nmrl]", "[s]", "[.:,;!?]", "\\d", "[>\\])}]"]
"""An unknown word that ends in one of these counts as w0, w1, ...; any other unknown word counts as w33."""
PAD, STOP = 36, 35
ARCHITECTURE = small_decoder(
    vocab_size=37, hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, context_length=64,
    rope_theta=100.0, tied=False,
)  # fmt: skip
SMALL = {
    "layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "intermediate_size": 48, "context_length": 64,
    "rope_theta": 100.0, "tied": False, "compilation_cache": None, "gradient_checkpointing": False, "threads": 1,
}  # fmt: skip
"""Values for keys of policies and backends, set if a configuration has the key."""
LENGTHS = {"prompt": 6, "response": 12, "multiple": 4}


def tokenizer() -> Tokenizer:
    """A word-level tokenizer. <stop> is its EOS; <eos> is an ordinary word. It encodes any text: a word outside the vocabulary,
    for example from a plugin's own template, counts as one of its words, chosen by the last character."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate([*WORDS, "<eos>", "<stop>", "<pad>"])}))
    own = r"(?:w(?:[12]?\d|3[0-3])|<eos>|<stop>|<pad>)"
    core.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Replace(tokenizers.Regex(rf"(?<!\S)(?!{own}(?!\S))\S*{last}(?!\S)"), word)
        for last, word in [*zip(LAST, WORDS, strict=False), (r"\S", WORDS[-1])]
    ])  # fmt: skip
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<stop>", "<pad>"])
    template = "{% for m in messages %}{{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}"
    return Tokenizer(core, eos_token="<stop>", pad_token="<pad>", chat_template=template)


def write_checkpoint(folder: Path, seed: int, architecture: Architecture = ARCHITECTURE) -> Path:
    """Write a Llama of this world in Hugging Face's format, with large weights."""
    write_tensors(folder / "model.safetensors", enlarged(initial_parameters(architecture, seed)))
    write_json(folder / "config.json", to_hf(architecture))
    tokenizer().save(folder)
    return folder


def enlarged(parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array * (10 if array.ndim > 1 else 1) for name, array in parameters.items()}


def saved_weights(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The weights file that a model or adapter wrote, and its contents."""
    file = next(folder.glob("*.safetensors"))
    return file, read_tensors(file)


def head(width: int, seed: int = 9) -> np.ndarray:
    """A scalar head [width] that is not 0."""
    return np.random.default_rng(seed).normal(0, 0.3, width).astype(np.float32)


def sentence(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


class Data(DataSource):
    """Twelve examples of each type, of different lengths. Comparisons have two to four completions, some tied unless ``ties`` is
    False."""

    rows = 12

    def __init__(self, ties: bool = True):
        self.ties = ties

    def texts(self, split: str) -> list[str]:
        return [sentence(100 + i, 3 + i % 5) for i in range(self.rows)]

    def demonstrations(self, split: str) -> list[Demonstration]:
        return [Demonstration(p, sentence(200 + i, 1 + i % 6)) for i, p in enumerate(self.prompts(split))]

    def comparisons(self, split: str) -> list[Comparison]:
        ranks = [(1, 0), (0, 1, 2), (2, 0, 1, 0) if self.ties else (3, 0, 2, 1), (0, 1)]
        return [
            Comparison(p, tuple(sentence(300 + 10 * i + k, 1 + (i + k) % 6) for k in range(len(r))), r)
            for i, (p, r) in enumerate(zip(self.prompts(split), ranks * 3, strict=True))
        ]

    def prompts(self, split: str) -> list[Prompt]:
        """Every fourth prompt is a dialogue in which the assistant has already answered once."""
        words = [sentence(i, 2 + i % 5).split() for i in range(self.rows)]
        turns = [[[w[0]], [w[1]], w[2:]] if i % 4 == 3 else [w] for i, w in enumerate(words)]
        roles: tuple[Role, ...] = ("user", "assistant", "user")
        return [Prompt(tuple(Message(role, " ".join(t)) for role, t in zip(roles, each, strict=False))) for each in turns]


class Scored(RewardModel):
    """A reward model: ``function(responses) -> scores``, and optionally a network to start a value network from."""

    def __init__(
        self, function: Callable[..., Any] = lambda r: r.sequences.mask.sum(axis=1) - 5.0, network: ScalarModel | None = None
    ):
        self.function, self.network = function, network

    def score(self, responses):
        return np.asarray(self.function(responses), np.float32)

    def value_network(self):
        return None if self.network is None else self.network.copy()


class Talks(Environment):
    """Says two words after the policy's first turn."""

    def reply(self, episode: Episode) -> Reply:
        return Reply.says("w4 w5") if episode.turn == 1 else Reply.ends(1.0)


def word_scores(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """A reward function over text, with scores that are not whole numbers."""
    return [0.73 + sum(len(word) for word in text.split()) / 7 for text in responses]


def passages() -> list[str]:
    """The passages of a search index."""
    return ["w1 w2", "w3 yes", "w1 w4 w5"]


def longest_word(text: str) -> str:
    """A tool: return the longest word."""
    return max(text.split(), key=len)


def known(changes: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """The changes whose keys exist in the group, at every depth."""
    return {
        key: known(value, group[key]) if isinstance(value, Mapping) and isinstance(group[key], Mapping) else value
        for key, value in changes.items()
        if key in group
    }


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """{'lengths': {'prompt': 6}} -> {'lengths.prompt': 6}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= {f"{key}.{k}": v for k, v in flat(value).items()} if isinstance(value, Mapping) else {key: value}
    return found


@functools.cache
def file_of(kind: str, name: str, folders: tuple[tuple[str, Path], ...]) -> dict[str, Any]:
    """A component's configuration file, without the key ``name``; empty if there is no file. Cached, because composing takes half
    a second; ``folders`` is an argument because the result depends on it."""
    return {key: value for key, value in compose.group(kind, name).items() if key != "name"}


def configured(
    kind: str, name: str, backend: str, changes: Mapping[str, Any], asked: Mapping[str, Any], like: str | None = None
) -> tuple[type[Any], Any, dict[str, Any]]:
    """A component's class, its configuration, and the values set beyond the file. The configuration is the YAML file (or that of
    ``like``), overridden by ``changes``, then by ``asked``.

    Raises:
      ConfigError: a value is missing.
    """
    cls = registry().resolve(kind, name, backend)
    group = file_of(kind, like or name, tuple(registry().conf.items()))
    given = known({**SMALL, **changes}, group or {field.name: None for field in dataclasses.fields(cls.Config)})
    config = parse(cls.Config, OmegaConf.to_container(OmegaConf.merge(group, given, asked)), kind)
    return cls, config, OmegaConf.to_container(OmegaConf.merge(given, asked))


def nested(overrides: Sequence[str]) -> dict[str, Any]:
    """['backend.device=cuda'] -> {'backend': {'device': 'cuda'}}."""
    return OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))


def workers(backend: str, overrides: Sequence[str], like: str | None = None) -> int:
    """How many processes a world on this backend needs on this host."""
    cls, config, _ = configured("backend", backend, backend, {}, nested(overrides).get("backend", {}), like)
    return cls.workers(config)


@contextlib.contextmanager
def without_launcher() -> Iterator[None]:
    """Hide the launcher's environment variables, as if this process were alone."""
    held = {name: os.environ.pop(name) for names in LAUNCHERS for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


def with_prompts(rows: Sequences, which: np.ndarray) -> Sequences:
    """The same responses, with the prompts of the rows ``which``."""
    tokens = np.concatenate([rows.tokens[which, : rows.prompt_length], rows.responses], axis=1)
    return dataclasses.replace(rows, tokens=tokens, prompt_mask=rows.prompt_mask[which])


class World:
    """One backend, a policy on it, and what a check needs around them.

    With several processes, each has its own world, and all run the same checks at the same time. The backend computes
    collectively, but each world has its own folder and writes all files there. `processes` is the group of these processes.

    Args:
        backend: the registered name of the backend.
        precision: 'float32' or 'bfloat16', if the backend's configuration has the key; None keeps the file's value.
        policy: the registered name of the policy; None takes the default, or the backend's first policy if it lacks the default.
        like: the name of the backend's configuration file; None takes the backend's own name.
        overrides: 'backend.device=cuda', 'policy.layers=4', ...: values that differ from the YAML files.
    """

    def __init__(
        self,
        backend: str,
        *,
        precision: str | None = None,
        policy: str | None = None,
        overrides: Sequence[str] = (),
        like: str | None = None,
    ):
        self.name, self.like, self.asked = backend, like, tuple(overrides)
        self.given: dict[str, dict[str, Any]] = {}
        """{kind: the values set beyond the file when it was first built}: the kit's values and the overrides."""
        self.overrides = nested(overrides)
        cls, config = self.component("backend", backend, {} if precision is None else {"precision": precision}, like)
        self.config = config
        self.backend: Backend = cls(config)
        self.processes, self.backend.processes = self.backend.processes, ALONE
        self.precision = self.backend.describe()["precision"]
        self.tokenizer, self.data = tokenizer(), Data()
        self.policy_name = policy or self._policies()
        self._folder = tempfile.TemporaryDirectory(prefix="lockstep-check-")
        self.folder = Path(self._folder.name)

    def tolerance(self, float32: float, bfloat16: float) -> float:
        """The tolerance for the backend's precision: that of float32 unless it is bfloat16."""
        return bfloat16 if self.precision == "bfloat16" else float32

    def component(self, kind: str, name: str, changes: Mapping[str, Any], like: str | None = None) -> tuple[type[Any], Any]:
        """A component's class and its configuration: the YAML file (or that of ``like``), overridden by ``changes``, then by the
        overrides.

        Raises:
          ConfigError: a value is missing.
        """
        cls, config, given = configured(kind, name, self.name, changes, self.overrides.get(kind, {}), like)
        self.given.setdefault(kind, given)
        return cls, config

    @functools.cached_property
    def alone(self) -> World:
        """The same world on one device of this process.

        Raises:
          Inapplicable: this world already runs on one device, or needs several processes and has one.
        """
        if self.processes.count == 1:
            if not self.overrides.get("backend", {}).get("mesh"):
                raise Inapplicable("it runs on one device. Add, say, backend.mesh.fsdp=2")
            if (wanted := self.backend.workers(self.config)) > 1:
                raise Inapplicable(f"it needs {wanted} processes, which `lockstep check` starts")
        others = [each for each in self.asked if not each.startswith("backend.mesh")]
        with without_launcher():
            return World(self.name, precision=self.precision, policy=self.policy_name, overrides=others, like=self.like)

    def settings(self) -> list[str]:
        """The values that the kit sets, as 'policy.layers=2'; with the overrides, without paths of its own files and without
        tokenizer keys."""
        _ = self._policy
        return [
            override(f"{kind}.{key}", value)
            for kind, given in self.given.items()
            for key, value in flat(given).items()
            if not str(value).startswith(str(self.folder)) and not key.startswith("tokenizer.")
        ]

    def policy(self, number: int = 0) -> Policy:
        """A fresh copy of policy 0 or 1, which have the same architecture and different weights."""
        cls, _ = self._policy
        return cls.load(self._policy_folder(number), self.backend)

    def created(self, seed: int) -> Policy:
        """The policy as a run would create it, with initial weights."""
        cls, config = self._policy
        return cls.create(config, self.backend, self.tokenizer, seed)

    def scalar_model(self, number: int = 0) -> ScalarModel:
        """A policy's trunk with a nonzero scalar head."""
        policy = self.policy(number)
        return policy.scalar_model(head(policy.hidden_size))

    def rollout(self, rows: int = 8, prompt_columns: int = 7, response_columns: int = 6, seed: int = 0) -> Sequences:
        """Ragged rows of random words; half of the responses end with the stop token."""
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, 34, 1 + i % 5).tolist() for i in range(rows)]
        responses = [
            rng.integers(0, 34, 1 + (3 * i) % (response_columns - 1)).tolist() + ([STOP] if i % 2 else []) for i in range(rows)
        ]
        return pack(prompts, responses, PAD, prompt_columns=prompt_columns, response_columns=response_columns)

    def prompts(self, rows: int = 16, columns: int = 7) -> tuple[np.ndarray, np.ndarray]:
        """Ragged prompts, left-padded: tokens and mask [rows, columns]."""
        rng = np.random.default_rng(1)
        return left_pad([rng.integers(0, 34, 1 + i % 6).tolist() for i in range(rows)], PAD, columns)

    def seeds(self, rows: int, columns: int, step: int = 0) -> np.ndarray:
        return randomness.token_seeds(0, "conformance", step, rows, columns)

    @property
    def from_checkpoint(self) -> bool:
        """True if the policy starts from a checkpoint's weights, whatever the seed."""
        return hasattr(self._policy[1], "path") and not self.adapted

    @property
    def adapted(self) -> bool:
        """True if the policy trains an adapter and saves only that."""
        return isinstance(self._policy[1], adapters.LoRAConfig)

    @functools.cached_property
    def _policy(self) -> tuple[type, Any]:
        checkpoint = write_checkpoint(self.folder / "checkpoint", 0)
        tokenizer = {"path": None, "eos_token": None, "pad_token": None, "chat_template": None, "date": None}
        return self.component("policy", self.policy_name, {"path": str(checkpoint), "tokenizer": tokenizer})

    @functools.cache  # noqa: B019 - a world lives as long as its checks
    def _policy_folder(self, number: int) -> Path:
        folder = self.folder / f"policy{number}"
        self.created(number).save(folder)
        file, weights = saved_weights(folder)
        if self.adapted:  # a fresh adapter changes no output
            rng = np.random.default_rng(number)
            weights = {name: rng.normal(0, 0.3, array.shape).astype(np.float32) for name, array in weights.items()}
        elif not self.from_checkpoint:  # the kit's checkpoint already has large weights
            weights = enlarged(weights)
        elif number:
            weights = {name: array[..., ::-1] for name, array in weights.items()}
        write_tensors(file, weights)
        return folder

    def _policies(self) -> str:
        names = [c.name for c in registry() if c.kind == "policy" and c.backend in (self.name, None)]
        if not names:
            raise ConfigError(f"No policy is registered for the backend '{self.name}', so there is no way to check it.")
        usual = compose.default("policy")
        return usual if usual in names else names[0]
