"""Dialogues that teach every turn of the assistant: what counts, under templates in the style of well-known models.

Expected masks come from decoding: the counted tokens of each turn are its text and its end-of-turn token, no more.
"""

from __future__ import annotations

import itertools

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lockstep.errors import ConfigError
from lockstep.text import encoding
from lockstep.text.encoding import Lengths
from lockstep.text.templates import TEMPLATES
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Demonstration, Fit, Message, Prompt

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}"
    "{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATED = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "llama2": (LLAMA2, "</s>"),
}
FORGETS = (
    "{% for m in messages %}"
    "{{ m.role + ': ' + (m.content.split('</think>')[-1] if m.role == 'assistant' else m.content) + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Takes the reasoning off earlier turns, as templates of reasoning models do."""

SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>",
]  # fmt: skip
TURNS = (
    ("user", "Name a colour."),
    ("assistant", "Green.\n\nOr red."),
    ("user", "Why? Zwei Zeilen ⛺"),
    ("assistant", "  Grass is green. ⛺ "),
    ("user", "Name a colour."),
)
LAST = "Name: 数字 42"


@pytest.fixture(scope="module")
def core() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([content for _, content in TURNS] * 3 + ["\n\n", "assistant\n", " model\n"] * 9, trainer)
    return tokenizer


def make(core, template, eos) -> Tokenizer:
    return Tokenizer(core, eos_token=eos, pad_token="<pad>", chat_template=template, bos_token="<s>")


def demonstration(turns=TURNS, last=LAST, dialogue=True) -> Demonstration:
    return Demonstration(Prompt(tuple(Message(*turn) for turn in turns)), last, dialogue)


def encode(tokenizer, one, limits=(400, 40), **how):
    how = {"every_turn": True} | how
    return encoding.encode_demonstrations(tokenizer, [one], Lengths(*limits, 1), **how)[0]


def counted_texts(core, example) -> list[str]:
    """Each run of counted tokens, decoded with its special tokens."""
    runs = itertools.groupby(zip(example.response, example.counts, strict=True), key=lambda pair: pair[1])
    return [core.decode([token for token, _ in run], skip_special_tokens=False) for counts, run in runs if counts]


@pytest.mark.parametrize("name", TEMPLATED)
def test_what_counts_is_each_turn_of_the_assistant_and_its_end(core, name):
    template, eos = TEMPLATED[name]
    example = encode(make(core, template, eos), demonstration())
    kept = (lambda text: text) if name == "chatml" else str.strip  # the others trim what they write
    earlier = [kept(content) for role, content in TURNS if role == "assistant"]
    if name == "llama2":  # its space before EOS is a run of its own, which does not count
        assert counted_texts(core, example) == [earlier[0], eos, earlier[1], eos, LAST + eos]
    else:
        leading = len(earlier[1]) - len(earlier[1].lstrip())
        assert leading == (2 if name == "chatml" else 0)
        assert counted_texts(core, example) == [text + eos for text in (*earlier, LAST)]


@pytest.mark.parametrize("name", TEMPLATED)
def test_the_model_reads_the_dialogue_as_the_template_writes_it(core, name):
    template, eos = TEMPLATED[name]
    tokenizer, one = make(core, template, eos), demonstration()
    example = encode(tokenizer, one)
    text = core.decode(example.prompt + example.response, skip_special_tokens=False)
    assert text == tokenizer.render(one.prompt.messages, add_generation_prompt=True) + LAST + eos
    first = tokenizer.render(one.prompt.messages[:1], add_generation_prompt=True)
    if name == "llama2":  # its space before the turn goes to the prompt
        first += " "
    assert example.prompt == tokenizer.encode(first)


def test_only_the_last_turn_counts_where_that_is_asked_for_or_the_rest_is_no_demonstration(core):
    tokenizer = make(core, *TEMPLATED["chatml"])
    for one, every_turn in ((demonstration(), False), (demonstration(dialogue=False), True)):
        example = encode(tokenizer, one, every_turn=every_turn)
        assert example.counted is None
        assert core.decode(example.response, skip_special_tokens=False) == LAST + "<|im_end|>"


def test_a_transcript_without_end_of_turn_tokens_counts_its_turns_and_the_last_end(core):
    example = encode(make(core, TEMPLATES["dialogue"], "</s>"), demonstration(TURNS[:3]))
    assert counted_texts(core, example) == ["Green.\n\nOr red.", LAST + "</s>"]


def test_a_template_that_rewrites_earlier_turns_is_an_error_that_says_where(core):
    turns = (("user", "Why?"), ("assistant", "Hm.</think>Green."), ("user", "Why?"))
    with pytest.raises(ConfigError) as error:
        encode(make(core, FORGETS, "</s>"), demonstration(turns))
    assert str(error.value) == (
        "This chat template writes an earlier assistant turn differently once the dialogue continues, so its tokens "
        "cannot be identified: after 'user: Why?\\nassistant: ' comes 'Green.\\nuser: Why?\\nassistant: ' where "
        "'Hm.</think>Green.' was expected. Set sft.assistant_turns=last, or policy.tokenizer.chat_template to a template that "
        "writes all turns alike."
    )


def test_a_long_dialogue_loses_its_oldest_turns_and_teaches_the_rest(core):
    tokenizer = make(core, *TEMPLATED["chatml"])
    long = sum(map(len, encoding._turns(tokenizer, demonstration().prompt.messages)))
    assert len(counted_texts(core, encode(tokenizer, demonstration(), (long, 40)))) == 3
    fit = Fit()
    shorter = encode(tokenizer, demonstration(), (long - 1, 40), fit=fit)
    assert fit.counts() == {"total": 1, "dropped": 0, "shortened": 1, "cut": 0, "alike": 0, "special": 0}
    assert counted_texts(core, shorter) == [TURNS[3][1] + "<|im_end|>", LAST + "<|im_end|>"]
    assert encode(tokenizer, demonstration(), (long - 1, 2)).counts[-2:] == [True, True]
    few = encode(tokenizer, demonstration(), (30, 40))
    assert counted_texts(core, few) == [LAST + "<|im_end|>"]


def test_a_block_of_dialogues_has_room_for_all_turns_and_counts_in_their_places(core):
    tokenizer = make(core, *TEMPLATED["chatml"])
    dialogue, single = encode(tokenizer, demonstration()), encode(tokenizer, demonstration(TURNS[:1]))
    lengths = Lengths(len(dialogue.prompt) + len(dialogue.response), 40, 8)
    rows = encoding.block([dialogue, single], tokenizer, lengths)
    for row, example in enumerate((dialogue, single)):
        counted = [token for token, counts in zip(example.response, example.counts, strict=True) if counts]
        assert rows.responses[row][rows.mask[row]].tolist() == counted
        assert rows.responses[row][rows.response_mask[row]].tolist() == example.response
    packed = encoding.packed_block([dialogue, single], tokenizer, lengths, rows_multiple=1)
    assert packed.mask.sum() == rows.mask.sum()
    assert sorted(packed.responses[packed.mask].tolist()) == sorted(rows.responses[rows.mask].tolist())
    with_prompts = encoding.block([dialogue, single], tokenizer, lengths, prompt_loss=True)
    assert with_prompts.mask.sum() == sum(len(e.prompt) - 1 + len(e.response) for e in (dialogue, single))
