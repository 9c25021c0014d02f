"""A language model with a scalar head: an output of the algorithm ``reward_modelling``, or an unchanged public reward model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, RewardError, listing
from lockstep.interfaces import Classifier, Inputs, Resources, Responses, RewardModel, ScalarModel
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths
from lockstep.text.sequences import Sequences, chunks, in_chunks
from lockstep.text.stopping import ends_with_stop
from lockstep.text.templates import TEMPLATES, template_files, template_text
from lockstep.types import Message, Prompt

log = logging.getLogger("lockstep")


class Learned(RewardModel):
    """``source`` is a stage of this run, a folder written by a stage, or a public reward model: a folder or hub id of an
    ``AutoModelForSequenceClassification`` checkpoint with one label. What the model reads depends on ``source``:

    * a stage's output with the policy's tokenizer (and no chat template other than the policy's): the policy's tokens directly;
    * a stage's output with another tokenizer or chat template: the text, rendered and encoded as in its training;
    * a public decoder (``score.weight``): the whole dialogue in its own chat template, without pad tokens at its end;
    * a public encoder (BERT, DeBERTa, ...; torch only): the whole dialogue if it has a chat template, else prompt and response
      as a pair of texts.

    In text, special tokens that the policy spelled with ordinary ones are broken up by a space: else its response could close its
    own turn and praise it in the user's name.

    ``chat_template`` replaces the model's own. A response that does not fit the model has no score (NaN); a warning counts
    such responses.
    """

    @dataclass(frozen=True)
    class Config:
        source: str = setting("reward", "A stage, or a folder or hub id of a public reward model.")
        micro_batch_size: int | None = setting(64, "Rows per forward pass; null: all.", least=1)
        chat_template: str | None = setting(None, "Jinja text, dialogue or plain, for the model; null: its tokenizer's own.")

    @classmethod
    def inputs(cls, config: Config) -> Inputs:
        return Inputs(outputs={config.source: "reward_model"}, files=template_files(config.chat_template))

    def __init__(self, config: Config, resources: Resources):
        self.config = config
        self.model: ScalarModel | None = None
        self.embedding: int | None = None
        """The rows of the embedding that the policy's ids index: the model's, or its value network's; None if it reads text."""
        kind = resources.kind(config.source)
        if kind == "encoder":
            self.read = self._pairs_read_by(resources.classifier(config.source))
            return
        self.model, self.tokenizer = model, _ = resources.scalar_model(config.source)
        self.same_vocabulary = self.tokenizer.core.to_str() == resources.tokenizer.core.to_str()
        template = template_text(config.chat_template) or self.tokenizer.chat_template
        same_text = template in (None, resources.tokenizer.chat_template)
        self.shares_tokens = kind == "stage" and self.same_vocabulary and same_text
        if self.shares_tokens:
            self.embedding = model.vocab_size
            resources.tokenizer.check_embedding(model.vocab_size, f"the reward model '{config.source}'")
            self.read = lambda responses: self._score_tokens(responses.sequences, model.context_length)
        elif kind == "stage":
            self.tokenizer.chat_template = template
            self.read = lambda responses: self._score_fitting(self._as_trained(responses))
        else:
            if template is None:
                raise ConfigError(
                    f"The tokenizer of the reward model '{config.source}' has no chat template. Set reward_model.chat_template "
                    f"to jinja text or to one of: {listing(TEMPLATES)}."
                )
            self.tokenizer.chat_template = template
            self.read = lambda responses: self._score_fitting(self._as_dialogues(responses))

    def score(self, responses: Responses) -> np.ndarray:
        if self.embedding is not None:
            self._check_known(responses.sequences, self.embedding)
        return self.read(responses)

    def value_network(self) -> ScalarModel | None:
        if self.model is None or not self.same_vocabulary:
            return None
        self.embedding = self.model.vocab_size
        return self.model.copy()

    # ------------------------------------------------------------------------------------------------------ decoders

    def _score(self, rows: Sequences) -> np.ndarray:
        evaluate = lambda part: self.model.evaluate(part, ["scores"])  # noqa: E731
        return in_chunks(evaluate, rows, self.config.micro_batch_size)["scores"]

    def _check_known(self, rows: Sequences, embedding: int) -> None:
        """A policy whose embedding has more rows than the tokenizer has tokens can write ids that mean nothing.

        Raises:
          RewardError: the policy wrote an id for which this model has no row.
        """
        largest = int(rows.tokens.max(initial=0, where=rows.attention_mask))
        if largest >= embedding:
            raise RewardError(
                f"The policy wrote the token id {largest}, for which the reward model '{self.config.source}' has no row: its "
                f"embedding has {embedding} rows. Resize the embedding of either to that of the other."
            )

    def _score_tokens(self, rows: Sequences, longest: int) -> np.ndarray:
        """Scores of the policy's rows; NaN for those of more than ``longest`` tokens."""
        fits = np.flatnonzero(rows.attention_mask.sum(axis=1) <= longest)
        scores = np.full(rows.rows, np.nan, np.float32)
        _report(rows.rows - len(fits))
        if len(fits):
            scores[fits] = self._score(rows.take(fits))
        return scores

    def _score_fitting(self, examples: Sequence[Example | None]) -> np.ndarray:
        """Scores; NaN for examples that do not fit (None)."""
        fits = [i for i, example in enumerate(examples) if example is not None]
        scores = np.full(len(examples), np.nan, np.float32)
        _report(len(examples) - len(fits))
        if fits:
            kept = [examples[i] for i in fits]
            lengths = Lengths(self.model.context_length, max(len(example.response) for example in kept), 64)
            scores[fits] = self._score(encoding.block(kept, self.tokenizer, lengths))
        return scores

    def _as_trained(self, responses: Responses) -> list[Example | None]:
        """The responses in this model's tokens, with EOS only if the policy wrote its own. Prompts that are too long lose their
        oldest turns. None if the response and the rest of the prompt do not fit."""
        examples = []
        for prompt, text, ended in rows_of(responses, self.tokenizer.broken_up):
            response = self.tokenizer.encode(text) + [self.tokenizer.eos_id] * ended
            room = self.model.context_length - len(response)
            ids = encoding.encode_prompt(self.tokenizer, prompt, room) if room > 0 else None
            examples.append(None if ids is None else Example(ids, response))
        return examples

    def _as_dialogues(self, responses: Responses) -> list[Example | None]:
        """The whole dialogues; None if too long. All tokens but the last are the prompt: a decoder's score ignores the split."""
        assert self.model is not None
        texts = [rendered(self.tokenizer.render, *row) for row in rows_of(responses, self.tokenizer.broken_up)]
        longest, examples = self.model.context_length, []
        texts = [text if len(text) <= encoding.most_characters(longest) else "" for text in texts]
        for ids in self.tokenizer.encode_many(texts):
            while ids and ids[-1] == self.model.pad_id:
                ids.pop()
            examples.append(Example(ids[:-1], ids[-1:]) if 2 <= len(ids) <= longest else None)
        return examples

    # ------------------------------------------------------------------------------------------------------ encoders

    def _pairs_read_by(self, classifier: Classifier) -> Callable[[Responses], np.ndarray]:
        template = template_text(self.config.chat_template)
        render = classifier.renderer(template)

        def read(responses: Responses) -> np.ndarray:
            rows = rows_of(responses, classifier.broken_up)
            texts = [rendered(render, *row) if render else pair(row[0], row[1]) for row in rows]
            parts = [classifier.score(texts[part]) for part in chunks(len(texts), self.config.micro_batch_size)]
            scores = np.concatenate(parts) if parts else np.zeros(0, np.float32)
            _report(int(np.isnan(scores).sum()))
            return scores

        return read


def finished(responses: Responses) -> np.ndarray:
    """bool [B]: whether the policy wrote its own EOS."""
    rows = responses.sequences
    return ends_with_stop(rows.responses, rows.response_mask, [responses.tokenizer.eos_id])


def rows_of(responses: Responses, broken_up: Callable[[str], str]) -> list[tuple[Prompt, str, bool]]:
    """The prompt and text of each response, and whether the policy ended it. All assistant turns are ``broken_up``."""

    def of(message: Message) -> Message:
        return replace(message, content=broken_up(message.content)) if message.role == "assistant" else message

    prompts = [replace(prompt, messages=tuple(map(of, prompt.messages))) for prompt in responses.prompts]
    return list(zip(prompts, map(broken_up, responses.texts), map(bool, finished(responses)), strict=True))


def rendered(render: Callable[..., str], prompt: Prompt, text: str, ended: bool) -> str:
    """The whole dialogue as text. The assistant's turn is closed only if the policy closed it (``ended``). The text that the
    template writes before an answer is always there, even if the template ignores ``add_generation_prompt``."""
    whole = render([*prompt.messages, Message("assistant", text)], add_generation_prompt=False)
    if ended:
        return whole
    waiting = render(list(prompt.messages), add_generation_prompt=True)
    begin = whole.find(text.strip(), len(waiting)) if whole.startswith(waiting) else -1
    before = whole[len(waiting) : max(0, begin)]
    return waiting + (before if before.strip() else "") + text


def pair(prompt: Prompt, text: str) -> tuple[str, str]:
    return "\n\n".join(message.content for message in prompt.messages), text


def _report(count: int) -> None:
    if count:
        log.warning("%d responses are too long for the reward model and were not scored", count)
