"""The verbs: what a plugin implements. One file, so that a plugin author reads one file.

The waist is narrow on purpose. Backends own everything with parameters or a vocabulary axis (`Backend`, `Policy`,
`ScalarModel`, `Learner`). Everything of shape [batch, time] is numpy on the host and shared: rewards, advantages, masks,
seeds, batches. Only a `Loss` crosses: a pure function over [batch, time] arrays, written once against the Array API
standard. It takes the namespace ``xp`` as an argument; each backend differentiates and compiles it.

Shapes: B rows, P prompt columns (left-padded), T response columns (right-padded), V vocabulary. ``mask`` is True where
a token counts. Dtypes: tokens int32, masks bool, everything else float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy as np

from lockstep.errors import CheckpointError, ConfigError, MissingData, Unreachable, listing
from lockstep.processes import ALONE, Processes, call_text
from lockstep.types import Candidates, Choice, Comparison, Demonstration, Fit, Goal, Message, Prompt

if TYPE_CHECKING:
    from lockstep.learning.optimisation import OptimizerConfig
    from lockstep.models.blueprint import Blueprint
    from lockstep.planning.calls import Planner
    from lockstep.text.sequences import Sequences
    from lockstep.text.tokenizer import Tokenizer, TokenizerConfig

Array = Any
"""An array of some Array API namespace: numpy on the host, a backend's own inside a loss."""

Metrics = dict[str, float]


# ------------------------------------------------------------------------------------------------------- components


@dataclass(frozen=True)
class Inputs:
    """What a component reads besides its configuration. All of it is part of the identity of the stages that use the
    component: a stage reruns if any of it has changed.

    outputs: {source: kind} of what it opens. A source is a stage of the run, a folder or a hub id. The kind says what it must
      contain: 'policy', 'reward_model' or 'prompts' (attacks).
    files: paths of local files and folders; missing ones are ignored.
    members: configuration groups of the reward models that it combines.

    In a run of several processes, only process 0 calls a reward model or labeler that has neither outputs nor members. It shares
    the results with the others.
    """

    outputs: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    members: tuple[Mapping[str, Any], ...] = ()


class Component:
    """A class that a plugin registers. ``Config`` is the frozen dataclass of its configuration group."""

    Config: ClassVar[type]

    @classmethod
    def inputs(cls, config: Any) -> Inputs:
        """What the component reads, derived from its configuration alone; opens nothing."""
        return Inputs()

    @classmethod
    def check(cls, config: Any) -> None:
        """Check that whatever the configuration refers to exists, such as a function to import or an environment variable. Called
        before the first stage of a run and by dry runs; loads no model.

        Raises:
          LockstepError: something is missing.
        """


# ----------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Generated:
    """A batch of sampled responses.

    tokens: int32 [B, T].
    mask: bool [B, T]. True up to and including the stop token, False after it.
    logprobs: float32 [B, T], the sampler's own, at the sampling temperature.
    cache: opaque; the keys and values of the [B, P + T] columns, which a later `Past` reuses, without each row's last token. None
      if the policy keeps none.
    """

    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    cache: Any = None


@dataclass(frozen=True)
class Past:
    """The part of left-padded prompts that an earlier call has already read. For c < ``known``, column c of row b is either
    padding or column c + shift[b] of row rows[b] in ``cache``. ``rows`` and ``shift`` are int32 [B]."""

    cache: Any
    rows: np.ndarray
    shift: np.ndarray
    known: int


class Model(ABC):
    """Parameters on a backend, and the outputs they compute for each response token or each row.

    ``supplies`` names the outputs:

    | output | shape | |
    |---|---|---|
    | logprobs | [B, T] | log-probability of each response token given all before it, from logits / temperature |
    | entropy | [B, T] | entropy in nats of the distribution the token was drawn from, at the same temperature |
    | divergence | [B, T] | divergence of that distribution from a teacher's, over the whole vocabulary: `Policy.toward` |
    | values | [B, T] | scalar head *before* the token is emitted (the state; Ziegler et al. 2019) |
    | scores | [B] | scalar head at the last real token of the row |

    Columns where ``sequences.mask`` is False hold finite numbers that mean nothing. Attention and positions follow
    ``sequences.attention``. Models that don't support packing must raise `ConfigError` when ``segments`` is set.
    """

    supplies: frozenset[str]
    vocab_size: int
    context_length: int

    @abstractmethod
    def evaluate(self, sequences: Sequences, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, np.ndarray]:
        """The named outputs as float32 numpy arrays, without gradients, by teacher forcing with the training graph."""

    @abstractmethod
    def parameters(self) -> dict[str, np.ndarray]:
        """A float32 host copy of every parameter, with the names and layouts of the Hugging Face checkpoint, which all backends
        share. Parity checks compare these copies and checkpoints store them. An adapter on frozen weights returns only the
        adapter's and the head's parameters (`lockstep.models.adapters`)."""

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield `parameters` one at a time, so that on several devices only one at a time has to be whole."""
        yield from self.parameters().items()

    @abstractmethod
    def copy(self) -> Self:
        """An independent model with equal parameters, for example a reference. Training the original does not change it."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a Hugging Face checkpoint (``config.json``, ``model.safetensors`` or its shards) that transformers opens; an
        adapter writes peft's files."""


class Policy(Model, Component):
    """A causal language model. Supplies logprobs and entropy; values too once it carries a value head. There are two ways to
    make one: `create` and `load`.
    """

    @classmethod
    def inputs(cls, config: Any) -> Inputs:
        path = cls.tokenizer_config(config).path
        return Inputs(files=() if path is None else (path,))

    @classmethod
    @abstractmethod
    def create(cls, config: Any, backend: Backend, tokenizer: Tokenizer, seed: int) -> Policy:
        """Make a policy from its configuration. Random initial weights are drawn on the host (`lockstep.learning.randomness`), so
        all backends start from the same ones."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, backend: Backend) -> Policy:
        """Load a checkpoint folder that `save` wrote, on this or another backend."""

    @classmethod
    def tokenizer_config(cls, config: Any) -> TokenizerConfig:
        """The tokenizer that the policy reads; a path of None means the data source's own."""
        return config.tokenizer

    @classmethod
    def survey(cls, config: Any) -> int | None:
        """Check, for a dry run, the local files that `create` would read, without loading weights. Return the number of rows in
        the model's embedding, or None if the files do not say.

        Raises:
          CheckpointError: the files are damaged or do not fit each other.
        """
        return None

    @classmethod
    def context(cls, config: Any) -> int | None:
        """The context length in tokens, prompt and response together; None if neither the configuration nor local files say.
        Length limits beyond it are refused before anything is trained."""
        return None

    @classmethod
    def blueprint(cls, config: Any, vocab_size: int) -> Blueprint:
        """The network that `create` would make, without weights, for `lockstep plan`.

        Args:
          vocab_size: the tokenizer's.

        Raises:
          LockstepError: the network is not known.
        """
        raise ConfigError(f"{cls.__name__} cannot be planned: it has no `blueprint`.")

    @classmethod
    def opens(cls, folder: Path) -> bool:
        """True if `load` reads this public checkpoint (a folder that no stage wrote). At most one policy should open it."""
        return False

    @classmethod
    @abstractmethod
    def load_scalar(cls, folder: Path, backend: Backend) -> ScalarModel:
        """Load a scalar model from a folder that `ScalarModel.save` wrote, on this or another backend, or that transformers wrote
        for a decoder that is a sequence classifier with one label.

        Raises:
          CheckpointError: the checkpoint has no scalar head, or another number of labels.
        """

    @classmethod
    def load_classifier(cls, folder: Path, backend: Backend) -> Classifier:
        """Load the checkpoint of a sequence classifier that is not a decoder."""
        raise CheckpointError(
            f"'{folder}' holds no decoder with a scalar head ('score.weight'). If it is an encoder with a classification head "
            "(BERT, DeBERTa, ...), backend=torch opens it."
        )

    @abstractmethod
    def generate(
        self,
        prompt_tokens: np.ndarray,
        prompt_mask: np.ndarray,
        seeds: np.ndarray,
        *,
        temperature: float,
        stop_ids: Sequence[int],
        pad_id: int,
        past: Past | None = None,
    ) -> Generated:
        """Sample one response per row from softmax(logits / temperature); temperature 0 takes the most likely token.

        Args:
          prompt_tokens, prompt_mask: [B, P], left-padded.
          seeds: uint32 [B, T]. Row b, column t draws its token by the hash-Gumbel rule of `lockstep.learning.randomness` from
            seeds[b, t] and nothing else, so the tokens do not depend on the backend or on how rows are batched.
          stop_ids: a row ends with the first of these, which is kept; everything after it is ``pad_id`` and masked.
          past: given only to a policy whose results have a ``cache``. It changes no token.
        """

    def stream(
        self,
        prompt_tokens: np.ndarray,
        prompt_mask: np.ndarray,
        seeds: np.ndarray,
        *,
        temperature: float,
        stop_ids: Sequence[int],
        pad_id: int,
    ) -> Iterator[np.ndarray]:
        """Yield the tokens of `generate`, one column int32 [B] at a time as it is drawn, until every row has ended. This default
        draws all columns before it yields the first."""
        how: dict[str, Any] = {"temperature": temperature, "stop_ids": stop_ids, "pad_id": pad_id}
        drawn = self.generate(prompt_tokens, prompt_mask, seeds, **how)
        yield from drawn.tokens[:, drawn.mask.any(axis=0)].T

    @abstractmethod
    def with_value_head(self) -> Policy:
        """A copy that also supplies values, from a zero-initialised head on the shared trunk."""

    def toward(self, teacher: Policy, beta: float) -> Policy:
        """A copy that also supplies ``divergence``: `lockstep.learning.losses.divergence` from ``teacher``, which is neither
        trained nor copied. Both distributions are at the temperature of the call.

        Raises:
          ConfigError: this policy cannot supply ``divergence``, or the teacher has another vocabulary.
        """
        raise ConfigError(
            f"{type(self).__name__} cannot compare its whole distribution with a teacher's. Set algorithm.loss=policy_gradient."
        )

    @abstractmethod
    def scalar_model(self, head: np.ndarray) -> ScalarModel:
        """A copy of the trunk with the scalar head ``head`` [hidden_size] and bias 0 in place of the language head."""

    hidden_size: int


def check_vocabularies(student: Model, teacher: Model) -> None:
    """
    Raises:
      ConfigError: their embeddings have different numbers of rows.
    """
    if student.vocab_size != teacher.vocab_size:
        raise ConfigError(
            f"The policy's embedding has {student.vocab_size} rows and the teacher's {teacher.vocab_size}, so their "
            "distributions cannot be compared. Resize either, or set algorithm.loss=policy_gradient."
        )


class ScalarModel(Model):
    """A trunk with a scalar head: a learned reward model (scores) or a value network (values)."""

    pad_id: int | None = None
    """The ``pad_token_id`` in the config.json that `Policy.load_scalar` read. transformers' classifiers read their score at the
    last token that is not this one, even if it is EOS."""

    @abstractmethod
    def rescale(self, gain: float, bias: float) -> None:
        """Fold ``gain * output + bias`` into the head, in place. This is how a reward model is normalised."""


class Classifier(ABC):
    """A public reward model that reads text in its own way (an encoder with a classification head). It only scores; nothing
    can be trained from its network."""

    @abstractmethod
    def broken_up(self, text: str) -> str:
        """The text with a space inside every special token that it spells."""

    @abstractmethod
    def renderer(self, template: str | None) -> Callable[..., str] | None:
        """A function that renders a dialogue as one text, called like `lockstep.text.tokenizer.Tokenizer.render`. It uses
        ``template``, else the model's own. None if there is neither; the model then reads pairs."""

    @abstractmethod
    def score(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> np.ndarray:
        """Scores float32 [B] of whole texts, or of (prompt, response) pairs; NaN where one is too long for the model."""


# --------------------------------------------------------------------------------------------------------- learning


class Loss(Protocol):
    """A differentiable objective over one micro-batch: hashable, so that a backend compiles it once.

    It returns *sums* of per-token quantities times weights that the host computed for the whole minibatch (say, a mask
    divided by the minibatch's token count). Sums of micro-batches add up, so gradients and metrics are the same for
    every micro-batch size. Masked columns must not reach the result: select with ``xp.where``, never multiply.
    """

    @property
    def outputs(self) -> tuple[str, ...]: ...

    def __call__(self, xp: Any, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]: ...


@dataclass(frozen=True)
class Dropout:
    """Residual dropout: elements of the attention and MLP outputs are zeroed at ``rate`` and the others are scaled by
    1 / (1 - rate). `lockstep.learning.randomness.dropout_bits` derives the bits from ``seeds`` uint32 [B], so they are the
    same on every backend and for every micro-batch size.

    A token's position is the number of real tokens before it (in its own example, if several share a row). Layer n, counted
    from 0, has the sites 2n (attention) and 2n + 1 (MLP).
    """

    rate: float
    seeds: np.ndarray


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """The models' ``outputs`` for ``sequences``, without dropout, from `Learner.forward`.

    A `Term` may carry the pass. The learner then differentiates the pass instead of running the models again. A pass serves
    one gradient, before the parameters change; the learner refuses it after that. The learner keeps what the gradient needs
    and frees it when the pass is used or dropped.
    """

    sequences: Sequences
    temperature: float
    outputs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Term:
    """One summand of an update: a loss, the sequences to run the models on, and the arrays [B, ...] the loss reads.

    ``forward`` is the pass that already computed this term's outputs, if there is one.

    Raises:
      ValueError: ``forward`` was made from other tokens or at another temperature, lacks an output that the loss reads, or the
        term has dropout.
    """

    loss: Loss
    sequences: Sequences
    batch: Mapping[str, np.ndarray]
    temperature: float = 1.0
    dropout: Dropout | None = None
    forward: ForwardPass | None = None

    @property
    def content(self) -> list[np.ndarray | str]:
        """What the term computes with. It must be the same on every process (`lockstep.processes.Processes.agree`)."""
        seeds = [] if self.dropout is None else [self.dropout.seeds]
        how = call_text(self.loss.outputs, self.temperature)
        return [self.sequences.tokens, self.sequences.attention, *self.batch.values(), *seeds, how]

    def __post_init__(self) -> None:
        made = self.forward
        if made is None:
            return
        missing = set(self.loss.outputs) - set(made.outputs)
        reasons = {
            "the pass read other tokens": not self.sequences.same_input(made.sequences),
            f"the pass has temperature {made.temperature:g}, the term {self.temperature:g}": made.temperature != self.temperature,
            "the term has dropout, and a pass has none": self.dropout is not None,
            f"the loss reads {listing(missing)}, the pass has {listing(made.outputs)}": bool(missing),
        }
        if wrong := [reason for reason, holds in reasons.items() if holds]:
            raise ValueError(
                f"This term cannot use its forward pass: {'; '.join(wrong)}. Call Learner.forward with the term's own sequences, "
                "temperature and outputs, or leave Term.forward out."
            )


class Learner(ABC):
    """Models under an optimizer. The backend knows gradients and devices; it does not know what is being learned.

    If several models supply an output that a loss reads, the first of them is used. Each model's gradient is clipped
    separately: if its norm exceeds ``max_grad_norm``, it is scaled by max_grad_norm / (norm + 1e-6).
    """

    models: Mapping[str, Model]

    def evaluate(self, sequences: Sequences, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, np.ndarray]:
        """Like `Model.evaluate`, with each output from the first model that supplies it."""
        found: dict[str, np.ndarray] = {}
        for name, wanted in suppliers(self.models, outputs).items():
            found |= self.models[name].evaluate(sequences, wanted, temperature=temperature)
        return found

    def forward(self, sequences: Sequences, outputs: Sequence[str], *, temperature: float = 1.0) -> ForwardPass:
        """Compute the outputs and keep the graph for the next update: pass the result as `Term.forward`.

        A learner that does not override this method evaluates, keeps nothing, and runs the models again for the gradient.
        """
        return ForwardPass(sequences, temperature, self.evaluate(sequences, outputs, temperature=temperature))

    @abstractmethod
    def update(self, terms: Sequence[Term], lr_scale: float = 1.0) -> Metrics:
        """One optimizer step on the summed gradients of all terms. Returns the summed metrics of the losses, ``loss``
        and ``grad_norm/<model>`` (before clipping). A term may be a micro-batch, another objective, or both."""

    @abstractmethod
    def gradients(self, terms: Sequence[Term]) -> dict[str, np.ndarray]:
        """The summed gradients under ``<model>.<parameter name>``, without a step: for tests and parity reports."""

    @abstractmethod
    def averaged(self, model: str) -> Model:
        """A copy of the named model: with its moving-average weights if ``ema_decay`` is set, else as it is."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write all that `restore` needs to resume: bit for bit on this backend, up to rounding on another.
        ``learner.safetensors`` has ``<model>.parameters|mean|square|average.<name>``, average with ``ema_decay`` only;
        ``learner.json`` has ``{"steps": n}``. `lockstep.storage.weights.write_learner` writes both. If the first is large, it is
        split into several files, and the processes share the writing."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Load the state that `save` wrote; the models must have been built from the same configuration.

        Raises:
          CheckpointError: the state belongs to other models or optimizers. Nothing is changed.
        """


def suppliers(models: Mapping[str, Model], outputs: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """{model: the outputs to take from it}. Each output comes from the first model that supplies it, so that a value network
    leaves the policy's trunk alone. Raises ConfigError if no model supplies an output."""
    first = {output: next((name for name, model in models.items() if output in model.supplies), None) for output in outputs}
    if missing := [output for output, supplier in first.items() if supplier is None]:
        raise ConfigError(f"The loss needs {listing(missing)}, which no model supplies. Models: {listing(models)}.")
    found = {name: tuple(output for output, supplier in first.items() if supplier == name) for name in models}
    return {name: wanted for name, wanted in found.items() if wanted}


def take_pass(kept: MutableMapping[ForwardPass, Any], forward: ForwardPass) -> Any:
    """Remove from ``kept``, and return, what a learner kept for the gradient of a pass.

    Raises:
      ValueError: nothing is kept for the pass.
    """
    if forward not in kept:
        raise ValueError(
            "This forward pass cannot be differentiated: it already served a gradient, the parameters have changed since, or "
            "another learner made it. Call Learner.forward again, or leave Term.forward out."
        )
    return kept.pop(forward)


class Backend(ABC, Component):
    """An array library on a device: makes learners and reports what it runs on. Knows no algorithm."""

    name: ClassVar[str]
    processes: Processes = ALONE
    """The processes that run this program together, each with a backend of its own. With several, methods of models and learners
    are collective: every process must call them (`Model.evaluate`, `Policy.generate`, `Learner.update`, `Model.parameters`,
    `Model.copy`, `Model.save` and all others) in the same order and with the same arguments, and gets the same results. The
    processes share the work of writing checkpoints."""

    @abstractmethod
    def __init__(self, config: Any): ...

    @abstractmethod
    def learner(self, models: Mapping[str, Model], optimizers: Mapping[str, OptimizerConfig]) -> Learner:
        """A learner that trains the models in place, each with the optimizer of its name."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Library versions, ``device`` and ``precision`` ('float32' or 'bfloat16'), for the run record."""

    @abstractmethod
    def peak_memory_bytes(self) -> int | None:
        """Peak memory in use on the accelerator so far; None where the backend runs in host memory."""

    @classmethod
    def workers(cls, config: Any) -> int:
        """How many processes to start on this host when no launcher has. Called if ``mesh`` in the backend's configuration has
        more than one device.

        Raises:
          ConfigError: the devices here do not fit the mesh, or their number is not known.
        """
        return 1

    @classmethod
    def planner(cls, config: Any, topology: str | None) -> Planner:
        """The planner that tells `lockstep plan` what the backend's programs need, on the devices here or on those of a
        ``topology`` such as 'v5e:4x4'.

        Raises:
          ConfigError: the backend cannot be planned, or not for this topology.
        """
        raise ConfigError(f"backend={cls.name} cannot be planned: it has no `planner`.")


# ----------------------------------------------------------------------------------------------------- reward models


@dataclass(frozen=True)
class Responses:
    """Responses to score: text for reward models that read text, tokens for those that share the policy's tokenizer
    (``sequences``, whose mask is True on the policy's own).

    After an episode of several turns, a prompt holds all messages before the policy's last turn, and the text is that turn. What
    an environment said is never part of a response. ``rewards`` float32 [B] are the environment's rewards, summed over each
    episode; None without an environment.
    """

    prompts: Sequence[Prompt]
    texts: Sequence[str]
    sequences: Sequences
    tokenizer: Tokenizer
    rewards: np.ndarray | None = None


class Resources(Protocol):
    """What a component may ask for when it is built, if its `Component.inputs` declare it."""

    backend: Backend
    tokenizer: Tokenizer
    """The policy's tokenizer."""

    def kind(self, source: str) -> Literal["stage", "decoder", "encoder"]:
        """What ``source`` is. 'stage': a stage's output. Otherwise it is a public sequence classifier (folder or hub id);
        'decoder': a decoder with a scalar head; 'encoder': anything else."""
        ...

    def policy(self, source: str) -> tuple[Policy, Tokenizer]:
        """A policy other than the one being trained, with its tokenizer: the output of the stage ``source``, or a public policy
        (folder or hub id)."""
        ...

    def attacks(self, source: str) -> Sequence[Prompt]:
        """The training attacks in the output of the stage ``source``, or in a folder, without their twins. ``truth["goal"]`` is
        the goal of each. A name that stands for several stages (``all.STAGE``) gives the attacks of all of them."""
        ...

    def scalar_model(self, source: str) -> tuple[ScalarModel, Tokenizer]:
        """A scalar model and its tokenizer: the output of the stage ``source``, a folder of that path, or a public decoder."""
        ...

    def classifier(self, source: str) -> Classifier:
        """A public checkpoint of the kind 'encoder'."""
        ...

    def reward_model(self, group: Mapping[str, Any]) -> RewardModel:
        """The reward model of a configuration group, for reward models that combine others."""
        ...


class RewardModel(ABC, Component):
    """Prompts and responses in, one score per response out. One contract for learned models, functions and endpoints.

    A failed score raises or, if the configuration allows episodes to be dropped, is NaN; it is never replaced by a number.
    """

    needs_environment: bool = False
    """True if it can score only episodes with an environment."""

    @classmethod
    def rehearse(cls, config: Any, data: DataSource) -> None:
        """Try what only a row of the data (`lockstep.learning.rows.first_row`) can show, such as a missing column or a function
        that crashes. Called after `check`, before the first stage of a run and by dry runs; loads no model and asks no server.
        Members are rehearsed separately.

        Raises:
          LockstepError: scoring would fail.
        """

    @abstractmethod
    def __init__(self, config: Any, resources: Resources): ...

    @abstractmethod
    def score(self, responses: Responses) -> np.ndarray:
        """Scores float32 [B]. Higher is better; after normalisation 0 is the mean over demonstrations."""

    def details(self) -> dict[str, np.ndarray]:
        """{name: float32 [B]}: other measures of each response from the last call to `score`. Logged as
        ``reward_model/<name>``."""
        return {}

    def value_network(self) -> ScalarModel | None:
        """A copy of the network that a value network may start from (Stiennon et al. 2020); None if no network here reads
        the policy's tokens."""
        return None


# ------------------------------------------------------------------------------------------------------ environments


@dataclass
class Episode:
    """A conversation between a policy and an environment.

    prompt: how it begins. Its ``truth`` is for the environment.
    messages: the policy's and the environment's turns since then, in order. The last is the policy's.
    seed: for an environment that draws random numbers; a function of (run seed, step, row).
    state: whatever the environment keeps for this episode; None at first.
    """

    prompt: Prompt
    seed: int
    messages: list[Message] = field(default_factory=list)
    state: Any = None

    @property
    def text(self) -> str:
        """The policy's last turn."""
        return self.messages[-1].content

    @property
    def turn(self) -> int:
        """The number of the policy's last turn, from 1."""
        return sum(message.role == "assistant" for message in self.messages)


@dataclass(frozen=True)
class Reply:
    """An environment's answer to a turn: messages for the policy to reply to, a reward, or the end of the episode. Without
    messages the episode ends too."""

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    done: bool = False

    @classmethod
    def says(cls, text: str, *, role: Literal["user", "tool"] = "user", reward: float = 0.0) -> Reply:
        """A reply of one message."""
        return cls((Message(role, text),), reward)

    @classmethod
    def ends(cls, reward: float = 0.0) -> Reply:
        return cls((), reward, True)


class Environment(ABC, Component):
    """What a policy converses with: a tool, a search index, a game, a user. One object serves all episodes, several at a time
    if the configuration says so; keep what belongs to one episode in `Episode.state`. The environment's ``Config`` extends
    `lockstep.learning.episodes.EnvironmentConfig`, which has the limits.
    """

    processes: Processes = ALONE
    """The processes that run this program. Only process 0 calls `reply`; all of them call `replies`."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools it offers. The chat template writes them into every prompt that names no tools of its own."""
    marks: tuple[str, ...] = ()
    """What the policy's text must have before a call, say. That text has no special tokens, so a mark that is one is refused."""

    def __init__(self, config: Any, resources: Resources | None = None):
        self.config = config

    @classmethod
    def examples(cls, config: Any) -> Sequence[Prompt]:
        """Prompts that it can converse about, for `lockstep check`. If the environment needs columns of its own, their ``truth``
        must have them."""
        return [Prompt.of("w1 w2"), Prompt.of("w3")]

    @abstractmethod
    def reply(self, episode: Episode) -> Reply:
        """Reply to the policy's last turn, which may be any text. The reply is context for the policy and never trained on;
        special tokens spelled in it are broken up. An exception counts as a failure of the episode, not as a reward of 0."""

    def replies(self, episodes: Sequence[Episode]) -> Sequence[Reply] | None:
        """The reply to each episode, for an environment that draws them from a model in batches: the same as `reply` gives,
        whichever episodes come together. Every process calls it, as models need, and an exception stops the run. None: `reply`
        is called for each."""
        return None

    def close(self, episode: Episode) -> None:
        """Called once at the end of each episode in which `reply` was called, however it ended."""


# ------------------------------------------------------------------------------------------------------------ engines


class Engine(ABC, Component):
    """Samples tokens in place of `Policy.generate`: another process, perhaps on other devices, that is given the policy's weights
    whenever they have changed. `lockstep.learning.served` calls it, on process 0 only, and checks its answers. The engine's
    ``Config`` extends `lockstep.learning.served.EngineConfig`.
    """

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def load(self, folder: Path, version: str) -> None:
        """Load the weights of a Hugging Face checkpoint, whose folder is removed when this returns. From now on `generate` draws
        with these weights and reports ``version``.

        Raises:
          EngineFailed: the weights could not be loaded.
        """

    @abstractmethod
    def generate(
        self,
        prompt_tokens: np.ndarray,
        prompt_mask: np.ndarray,
        seeds: np.ndarray,
        *,
        temperature: float,
        stop_ids: Sequence[int],
        pad_id: int,
    ) -> tuple[Generated, frozenset[str]]:
        """Sample like `Policy.generate`. Also return the versions of the weights that drew the tokens. ``logprobs`` are the
        sampler's own, at the sampling temperature. An engine whose tokens do not follow from ``seeds`` logs that once.

        Raises:
          EngineFailed: no tokens were drawn.
        """


# ----------------------------------------------------------------------------------------------------------- labelers


class Labeler(ABC, Component):
    """Ranks fresh responses: simulated people, a reward model, a judge, people."""

    @abstractmethod
    def __init__(self, config: Any, data: DataSource, resources: Resources): ...

    @abstractmethod
    def label(self, candidates: Sequence[Candidates], seed: int, folder: Path) -> Sequence[Label]:
        """Rankings of the candidates, in any order. Some candidates may be ranked by several labelers, others by none. A label
        depends on its prompt, its completions and the seed.

        Args:
          seed: for labelers that draw random numbers.
          folder: the stage's folder, which also has the candidates, for labelers outside this process.

        Raises:
          Waiting: people still have to give labels.
        """

    @classmethod
    def examples(cls, config: Any) -> tuple[DataSource, Sequence[Candidates]] | None:
        """Data and candidates that it can rank, for `lockstep check`; None if it can rank any."""
        return None

    @classmethod
    def received(cls, folder: Path) -> str | None:
        """A digest of labels that came into the stage's folder from outside. It is part of the identity of the stages that read
        them. None if the configuration determines the labels."""
        return None


@dataclass(frozen=True)
class Label:
    """The ranks of the completions of the candidates with this id; 0 is best, equal ranks are a tie."""

    id: str
    ranks: tuple[int, ...]
    labeler: str
    group: str | None = None


# ---------------------------------------------------------------------------------------------------------- attackers


class Attacker(ABC, Component):
    """Writes requests that a policy should refuse: fixed templates, or a policy that is told the goal."""

    @abstractmethod
    def __init__(self, config: Any, data: DataSource, resources: Resources): ...

    @abstractmethod
    def attack(self, goals: Sequence[Goal], seed: int) -> Sequence[Sequence[Message] | None]:
        """One dialogue for each goal, ending with the user's turn that should succeed; None if the attacker found no words for
        the goal. Equal goals may get different dialogues. A dialogue depends on its goal, its place in ``goals`` and the seed."""

    def twin(self, messages: Sequence[Message], goal: Goal) -> Sequence[Message] | None:
        """The same attack with ``goal.twin`` in the goal's place; None if there is no twin or the goal's words do not occur."""
        if goal.twin is None or not any(goal.text in message.content for message in messages):
            return None
        return [replace(each, content=each.content.replace(goal.text, goal.twin.text)) for each in messages]

    @classmethod
    def examples(cls, config: Any) -> tuple[DataSource, Sequence[Goal]] | None:
        """Data and goals that it can attack with, for `lockstep check`; None if any will do."""
        return None


# -------------------------------------------------------------------------------------------------------- algorithms


@dataclass
class Context:
    """Everything that an algorithm works with besides its own configuration."""

    seed: int
    backend: Backend
    tokenizer: Tokenizer
    data: DataSource
    policy: Policy
    reward_model: RewardModel | None = None
    environment: Environment | None = None
    resources: Resources | None = None
    """Other models that the algorithm's `inputs` declare."""
    engine: Any = None
    """A `lockstep.learning.served.Served` that draws the policy's responses; None if the policy draws them itself."""
    fits: dict[str, Fit] = field(default_factory=dict)
    """What length limits did to each data set; goes into the stage's record."""

    def fit(self, what: str) -> Fit:
        """A counter for the functions of `lockstep.text.encoding`; ``what`` names the data set, say 'train demonstrations'."""
        return self.fits.setdefault(what, Fit(what))


@dataclass(frozen=True)
class Traits:
    """What an algorithm does, whatever its configuration keys are called. The conformance kit decides from this which checks
    apply. The defaults are those of supervised learning from demonstrations.

    data: what it learns from. 'prompts' means responses that it samples.
    samples: responses sampled for each prompt of a step, in neighbouring rows; 0 if it samples none.
    rounds: the most batches of prompts that a step may sample; dynamic sampling (DAPO) has more than 1.
    turns: the most turns of the policy in an episode.
    compares: whether a response's advantage depends on the other responses to its prompt.
    epochs: what an epoch is a pass over: the data set, or the episodes of one step.
    updates: optimizer steps in each step, at most.
    kl: where KL to the initial policy counts. 'reward': it is subtracted from the score or each token's reward. 'return': it is
      subtracted from each token's return. 'loss': it is part of the loss (as in DPO). 'measured': it is only logged. 'none':
      there is no reference.
    clip: how the ratio of policies is bounded: 'ratio', PPO's clip; 'weight', CISPO's, which keeps the gradient.
    bounds: the bounds of that clip, for the ratio itself, not its distance from 1.
    """

    data: Literal["texts", "demonstrations", "comparisons", "prompts"] = "demonstrations"
    samples: int = 0
    rounds: int = 1
    turns: int = 1
    compares: bool = False
    epochs: Literal["data", "episodes"] = "data"
    updates: int = 1
    kl: Literal["none", "measured", "reward", "return", "loss"] = "none"
    clip: Literal["none", "ratio", "weight"] = "none"
    bounds: tuple[float, float] = (0.0, math.inf)


class Algorithm(ABC, Component):
    """One way of training: which data it needs, what happens to it on the host, and what the loss is.

    ``step`` should read like the algorithm box of the paper. All randomness comes from (seed, step), so a resumed run
    needs only the learner's state, `state` and the number of the next step.
    """

    produces: ClassVar[str]  # "policy" or "reward_model"
    needs_reward_model: ClassVar[bool] = False
    takes_environment: ClassVar[bool] = False

    learner: Learner
    total_steps: int

    @abstractmethod
    def __init__(self, config: Any, context: Context): ...

    @abstractmethod
    def step(self, step: int) -> Metrics:
        """Run iteration ``step`` of 0 .. total_steps - 1."""

    @classmethod
    def traits(cls, config: Any) -> Traits:
        """What the algorithm does under this configuration."""
        return Traits()

    @classmethod
    @abstractmethod
    def arithmetic(cls, config: Any, data: DataSource) -> str:
        """The resolved batch arithmetic in one line: what one step consumes, how many steps. Printed before any model
        is loaded, so it may count data but not tokens."""

    @abstractmethod
    def result(self) -> Model:
        """The trained model, to be saved as the stage's output."""

    def finish(self) -> Metrics:
        """Called once after the last step: held-out measures, normalisation."""
        return {}

    def samples(self) -> list[dict[str, Any]]:
        """The last step's rows for the samples table: text for people to read."""
        return []

    def state(self) -> dict[str, Any]:
        """JSON state, besides the learner's, that must survive a restart."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""


# -------------------------------------------------------------------------------------------------------------- data


class DataSource(ABC, Component):
    """Where prompts, demonstrations, comparisons and raw text come from. ``split`` is 'train' or 'heldout'; a source
    may have more splits of its prompts ('adversarial'). A source without one of these raises
    `lockstep.errors.MissingData` and says what to configure."""

    @abstractmethod
    def texts(self, split: str) -> Sequence[str]: ...

    @abstractmethod
    def demonstrations(self, split: str) -> Sequence[Demonstration]: ...

    @abstractmethod
    def comparisons(self, split: str) -> Sequence[Comparison]: ...

    @abstractmethod
    def prompts(self, split: str) -> Sequence[Prompt]: ...

    def goals(self, split: str) -> Sequence[Goal]:
        """The goals of attacks."""
        raise MissingData(f"{type(self).__name__} has no goals for attacks.")

    @classmethod
    def fingerprint(cls, config: Any) -> str | None:
        """A digest of what the data depend on beyond the configuration, such as file contents; part of every stage's identity.
        None if the configuration determines the data."""
        return None

    @classmethod
    def preview(cls, config: Any) -> DataSource:
        """The source as a dry run opens it: at most the first rows of remote data."""
        return cls(config)  # type: ignore[call-arg]  # every source is built from its configuration

    def survey(self) -> Iterator[tuple[str, str | Unreachable]]:
        """Yield, for a dry run, each place in the configuration that names data, and what was found there or why that is unknown.

        Raises:
          DataError: the data there cannot be used.
        """
        return iter(())

    def tokenizer(self) -> Tokenizer | None:
        """The source's own tokenizer, for policies that start from scratch."""
        return None

    def gold(self, prompt: Prompt, response: str) -> dict[str, float] | None:
        """The true scores of a response: ``gold`` and its parts. None if the source does not know them."""
        return None

    def tests(self) -> Mapping[str, Sequence[Choice]]:
        """{name: items} of the tests that evaluations give every policy, for the alignment tax and for bias."""
        return {}


# ----------------------------------------------------------------------------------------------------------- tracking


class Tracker(ABC, Component):
    """A place for a stage's record besides the run folder (which is always written)."""

    @abstractmethod
    def start(self, *, folder: Path, run: str, stage: str, identity: str, config: Mapping[str, Any], resume: bool) -> None:
        """Called when a stage starts or resumes. ``identity`` is stable across restarts. ``config`` is everything that determines
        the stage, without secrets; its ``inputs`` are {stage: identity} of the stages whose output it reads."""

    @abstractmethod
    def log(self, metrics: Metrics, step: int) -> None: ...

    @abstractmethod
    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None: ...

    @abstractmethod
    def alert(self, title: str, text: str, step: int) -> None:
        """Report something that a person should look at."""

    @abstractmethod
    def artifact(self, kind: str, folder: Path) -> None:
        """Record the stage's complete output: a 'policy', 'reward_model', 'evaluation', 'comparisons' or 'attacks'."""

    @abstractmethod
    def finish(self, failed: bool = False) -> None: ...
