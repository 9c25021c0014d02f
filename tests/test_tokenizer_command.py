"""`lockstep tokenizer`: a tokenizer from one's own data, and a policy from scratch that reads it."""

from __future__ import annotations

import argparse
import json

import pytest

from lockstep.commands import tokenizer as command
from lockstep.commands.run import run_config
from lockstep.config.compose import compose
from lockstep.errors import ConfigError, DataError
from lockstep.storage.files import read_json
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Message
from runs import DECODER

TEXTS = [f"The tent number {i} is near the river, and the river is near the tent. ⛺" for i in range(40)]


@pytest.fixture
def data(tmp_path) -> list[str]:
    """Overrides that name raw texts and demonstrations in local files."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    rows = [{"prompt": f"Where is tent {i}?", "completion": f"Near river {i}."} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"texts": "texts", "demonstrations": "rows"}
    return ["data=files", *(f"data.{noun}=[{{path: {tmp_path / name}.jsonl}}]" for noun, name in names.items())]


def make(folder, overrides, *given) -> Tokenizer:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(folder), *given]), overrides)
    return Tokenizer.load(folder)


def test_a_policy_from_scratch_trains_with_a_tokenizer_made_from_its_data(tmp_path, data, capsys):
    pytest.importorskip("torch")
    made = make(tmp_path / "bpe", data, "--vocab", "300")
    assert f"policy.tokenizer.path={tmp_path / 'bpe'}" in capsys.readouterr().out
    assert made.vocab_size == 300 and (made.eos_id, made.pad_id) == (0, 1)
    lengths = "{prompt: 48, response: 48, multiple: 48}"
    run = run_config(
        compose([
            *data, *DECODER, f"policy.tokenizer.path={tmp_path / 'bpe'}", f"folder={tmp_path / 'runs'}", "tracker=none",
            *(f"~stages.{name}" for name in ("sft", "reward", "ppo", "ppo_ptx", "evaluate")), "backend.threads=1",
            f"pretrain.lengths={lengths}", "pretrain.batch_size=16", "pretrain.heldout_examples=1",
        ]),
        "test",
    )  # fmt: skip
    assert read_json(run / "run.json")["status"] == "done"
    assert all(done["steps"] >= 2 for done in map(read_json, (tmp_path / "runs" / "stages").glob("*/done.json")))


def test_every_text_can_be_written_and_frequent_words_are_one_token(tmp_path, data):
    made = make(tmp_path / "bpe", data, "--vocab", "400")
    for text in (TEXTS[0], "数 \u0000 never seen \U0001f600\n\tEND"):
        assert made.decode(made.encode(text)) == text
    assert len(made.encode(" river")) == 1 and len(made.encode("\n\nHuman:")) < 5
    assert made.render([Message("user", "Hi.")], add_generation_prompt=True) == "\n\nHuman: Hi.\n\nAssistant:"


def test_the_same_data_make_the_same_tokenizer(tmp_path, data):
    for name in ("a", "b"):
        make(tmp_path / name, data)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    with pytest.raises(ConfigError, match="exists and is not empty. Give a new folder"):
        make(tmp_path / "a", data)


def test_without_text_or_room_it_says_what_to_type(tmp_path, data):
    with pytest.raises(
        DataError, match=r"There is no text to make a tokenizer from. Name some: lockstep tokenizer FOLDER data=files"
    ):
        make(tmp_path / "bpe", ["data=files"])
    with pytest.raises(ConfigError, match=r"--vocab 257 is below 258: 256 bytes, EOS and pad come first"):
        make(tmp_path / "bpe", data, "--vocab", "257")
    assert not (tmp_path / "bpe").exists()
