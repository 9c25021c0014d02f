"""lockstep tokenizer FOLDER [hydra overrides]: a byte-level BPE for a policy that starts from scratch on data of your own.

It is trained on the training split of the data that the overrides choose, with dialogues written by the chat template. The same
data give the same tokenizer.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.errors import ConfigError, DataError, MissingData, listing
from lockstep.reporting.console import Console
from lockstep.types import Message

if TYPE_CHECKING:
    from lockstep.interfaces import DataSource
    from lockstep.text.tokenizer import Tokenizer

HELP = "make a tokenizer from your data: lockstep tokenizer models/mine data=files data.texts=..."
OVERRIDES = True
EOS = "<|endoftext|>"
BYTES = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a new folder, for policy.tokenizer.path=FOLDER")
    parser.add_argument("--vocab", type=int, default=4096, metavar="N", help="tokens, bytes and special ones included (4096)")
    parser.add_argument("--template", default="dialogue", help="the chat template: dialogue or plain (dialogue)")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.config.compose import compose
    from lockstep.config.overrides import override, shell
    from lockstep.config.root import component_config
    from lockstep.registry import registry
    from lockstep.storage.files import expanded
    from lockstep.text.templates import TEMPLATES

    folder, console = expanded(arguments.folder), Console()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty. Give a new folder.")
    if arguments.vocab < BYTES + 2:
        raise ConfigError(f"--vocab {arguments.vocab} is below {BYTES + 2}: {BYTES} bytes, EOS and pad come first.")
    if arguments.template not in TEMPLATES:
        raise ConfigError(f"--template {arguments.template} is none of {listing(TEMPLATES)}.")
    data = compose(overrides)["data"]
    source = registry().resolve("data", data["name"])
    with console.waiting("reading the data"):
        texts = list(texts_of(source(component_config(source, data, "data")), arguments.template))
    tokenizer = trained(texts, arguments.vocab, arguments.template)
    tokenizer.save(folder)
    tokens = sum(map(len, tokenizer.encode_many(texts[:1000])))
    console.say(
        f"{folder} has {tokenizer.vocab_size} tokens, made from {len(texts)} texts: {sum(map(len, texts[:1000])) / tokens:.2f} "
        f"characters per token. To use them: lockstep run {' '.join(map(shell, overrides))} "
        f"{override('policy.tokenizer.path', str(folder))}"
    )


def texts_of(data: DataSource, template: str) -> Iterator[str]:
    """All the text that the source has for training: raw texts, and dialogues with each of their answers.

    Raises:
      DataError: it has none.
    """

    from lockstep.text.templates import TEMPLATES, render

    def written(messages: Sequence[Message], *answers: str) -> Iterator[str]:
        for answer in answers:
            dialogue = [*messages, Message("assistant", answer)]
            yield render(TEMPLATES[template], dialogue, add_generation_prompt=False, tokens={"bos_token": "", "eos_token": EOS})

    empty = True
    nouns: dict[str, Callable[[Any], Iterator[str]]] = {
        "texts": lambda text: iter([text]),
        "demonstrations": lambda each: written(each.prompt.messages, each.response),
        "comparisons": lambda each: written(each.prompt.messages, *each.completions),
        "prompts": lambda each: written(each.messages, ""),
    }
    for noun, texts in nouns.items():
        with contextlib.suppress(MissingData):
            for item in getattr(data, noun)("train"):
                for text in filter(str.strip, texts(item)):
                    empty = False
                    yield text
    if empty:
        raise DataError(
            "There is no text to make a tokenizer from. Name some: lockstep tokenizer FOLDER data=files "
            "data.texts='[{path: mine.jsonl}]', or demonstrations, comparisons, prompts: docs/data.md."
        )


def trained(texts: Sequence[str], vocab: int, template: str) -> Tokenizer:
    """Train byte pair encoding (Sennrich et al. 2016) on bytes (Radford et al. 2019), so that every text can be encoded. It has
    at most ``vocab`` tokens: a pair that occurs only once does not become a token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from lockstep.text.templates import TEMPLATES
    from lockstep.text.tokenizer import PAD, Tokenizer

    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    how = {"special_tokens": [EOS, PAD], "initial_alphabet": alphabet, "min_frequency": 2, "show_progress": False}
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, **how))
    return Tokenizer(core, eos_token=EOS, pad_token=PAD, chat_template=TEMPLATES[template])
