"""Valid folders to damage: made once, in a temporary folder that ends with the process."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lockstep.models.architecture import initial_parameters, small_decoder, to_hf
from lockstep.storage.files import write_json
from lockstep.storage.weights import write_tensors
from lockstep.text.tokenizer import TEMPLATES, Tokenizer

EOS, PAD = "<|end|>", "<|pad|>"
_TEMPORARY = tempfile.TemporaryDirectory(prefix="lockstep-hostile-")
WORK = Path(_TEMPORARY.name)

ROWS = [  # enough for two splits with any seed
    {"prompt": "Name a colour.", "chosen": "Green.", "rejected": "Loud.", "text": "Grass is green."},
    {"prompt": "Name a number.", "chosen": "Two.", "rejected": "Wet.", "text": "Two is a number."},
    {"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "A stone.", "text": "Pears grow on trees."},
    *({"prompt": f"Count to {n}.", "chosen": f"One to {n}.", "rejected": "No.", "text": f"Here is {n}."} for n in range(2, 20)),
]


@functools.cache
def tokenizer() -> Tokenizer:
    """Of bytes, so that every text has its ids."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([EOS, PAD])
    return Tokenizer(core, eos_token=EOS, pad_token=PAD, chat_template=TEMPLATES["dialogue"])


ARCHITECTURE = small_decoder(
    vocab_size=258, hidden_size=8, layers=2, heads=2, kv_heads=1, intermediate_size=12, context_length=4096, rope_theta=100.0,
    tied=False,
)  # fmt: skip


@functools.cache
def checkpoint() -> Path:
    """A tiny decoder with its tokenizer, in Hugging Face's layout."""
    folder = WORK / "checkpoint"
    tokenizer().save(folder)
    write_json(folder / "config.json", to_hf(ARCHITECTURE))
    write_tensors(folder / "model.safetensors", initial_parameters(ARCHITECTURE, 0))
    return folder


@functools.cache
def rows() -> Path:
    """A file that serves every noun."""
    file = WORK / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file
