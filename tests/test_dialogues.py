"""Dialogues that teach every turn of the assistant: what counts, under templates in the style of well-known models.

Expected masks come from decoding: the counted tokens of each turn are its text and its end-of-turn token, no more.
"""

from __future__ import annotations

import itertools

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lockstep.errors import ConfigError, DataError
from lockstep.text import borders, encoding
from lockstep.text.encoding import Lengths
from lockstep.text.templates import TEMPLATES
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Comparison, Demonstration, Fit, Message, Prompt, ToolCall

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

TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '[CALL]' + call.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Writes tools and calls, after ChatML."""

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


SEARCH = {"type": "function", "function": {"name": "search"}}
CALL = ToolCall("search", {"query": "green"})
CALLED = '[CALL]{"name": "search", "arguments": {"query": "green"}}'


def test_a_tool_call_is_a_turn_and_what_the_tool_says_is_none(core):
    tokenizer = make(core, TOOLS, "<|im_end|>")
    messages = Message("user", "Find it."), Message("assistant", "", (CALL,)), Message("tool", "3 found")
    whole = encode(tokenizer, Demonstration(Prompt(messages, tools=(SEARCH,)), "There are 3.", True))
    assert counted_texts(core, whole) == [CALLED + "<|im_end|>", "There are 3.<|im_end|>"]
    assert "search" in core.decode(whole.prompt) and "3 found" in core.decode(whole.response)
    begun = encode(tokenizer, Demonstration(Prompt(messages[:1], tools=(SEARCH,)), "", calls=(CALL,)), (400, 80))
    assert counted_texts(core, begun) == [CALLED + "<|im_end|>"] and begun.prompt == whole.prompt


def test_a_template_without_tools_or_calls_is_told(core):
    tokenizer, asked = make(core, *TEMPLATED["chatml"]), Message("user", "Find it.")
    with pytest.raises(DataError, match=r"demonstrations: the chat template does not write the tools .* ignore: \[tools\]"):
        encode(tokenizer, Demonstration(Prompt((asked,), tools=(SEARCH,)), "Ho"))
    for one in (
        Demonstration(Prompt((asked,)), "", calls=(CALL,)),
        Demonstration(Prompt((asked, Message("assistant", "", (CALL,)), asked)), "Ho", True),
    ):
        with pytest.raises(ConfigError, match="where \"a call of search, and '<|im_end|>'\" was expected"):
            encode(tokenizer, one)


REPLY = [Message("user", "Why? ⛺")]


@pytest.mark.parametrize("name", TEMPLATED)
@pytest.mark.parametrize("closed", [True, False])
def test_a_reply_is_what_the_template_writes_between_two_turns(core, name, closed):
    """The tokens of an episode of two turns are the dialogue as the template writes it, EOS once."""
    template, eos = TEMPLATED[name]
    tokenizer, said = make(core, template, eos), "Green.\n\nOr red."
    dialogue = Prompt((Message("user", "Name a colour."), Message("assistant", said)))
    ids = tokenizer.encode(tokenizer.render(dialogue.messages[:1], add_generation_prompt=True)) + tokenizer.encode(said)
    ids += [tokenizer.eos_id] * closed + encoding.encode_reply(tokenizer, dialogue, REPLY, closed=closed)
    expected = tokenizer.render([*dialogue.messages, *REPLY], add_generation_prompt=True)
    text = core.decode(ids, skip_special_tokens=False)
    assert text == expected if name != "llama2" else text.replace(" ", "") == expected.replace(" ", "")


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
        "'Hm.</think>Green.' was expected. Set policy.tokenizer.chat_template to a template that writes all turns "
        "alike; SFT can do without, with sft.assistant_turns=last."
    )


def test_a_long_dialogue_loses_its_oldest_turns_and_teaches_the_rest(core):
    tokenizer = make(core, *TEMPLATED["chatml"])
    long = sum(map(len, tokenizer.encode_many(encoding._turns(tokenizer, demonstration().prompt.messages))))
    assert len(counted_texts(core, encode(tokenizer, demonstration(), (long, 40)))) == 3
    fit = Fit()
    shorter = encode(tokenizer, demonstration(), (long - 1, 40), fit=fit)
    assert fit.counts() == {"total": 1, "dropped": 0, "shortened": 1, "cut": 0, "alike": 0, "special": 0, "unknown": 0}
    assert counted_texts(core, shorter) == [TURNS[3][1] + "<|im_end|>", LAST + "<|im_end|>"]
    assert encode(tokenizer, demonstration(), (long - 1, 2)).counts[-2:] == [True, True]
    few = encode(tokenizer, demonstration(), (30, 40))
    assert counted_texts(core, few) == [LAST + "<|im_end|>"]


# ---------------------------------------------------------------------------------------- where prompts and answers end

ASKED = Prompt.of("Name a colour.")
NO_HEADER = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
THINKS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content.split('</think>')[-1] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: <think>\n' }}{% endif %}"
)
SPACE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def said(caplog, tokenizer, *answers) -> list[str]:
    caplog.clear()
    demonstrations = [Demonstration(ASKED, answer) for answer in answers or [LAST]]
    encoding.encode_demonstrations(tokenizer, demonstrations, Lengths(400, 40, 1), Fit("train demonstrations"))
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama2"])  # GPT-2's rules split the line breaks of llama3 before a word
def test_templates_that_agree_with_the_tokens_of_training_give_no_warning(core, caplog, name):
    tokenizer = make(core, *TEMPLATED[name])
    assert said(caplog, tokenizer) == said(caplog, make(core, TEMPLATES["dialogue"], "</s>")) == []
    encoding.encode_prompts(tokenizer, [ASKED], Lengths(400, 40, 1))
    assert caplog.records == []


def test_a_template_that_ends_answers_with_another_token_than_eos_is_told_once(core, caplog):
    tokenizer = make(core, CHATML, "</s>")
    expected = [
        "the chat template ends an answer with '<|im_end|>', but responses end with EOS, '</s>': the policy learns another end "
        "than the template's. For the template's, set 'policy.tokenizer.eos_token=\"<|im_end|>\"'"
    ]
    assert said(caplog, tokenizer) == expected
    assert said(caplog, tokenizer) == []
    caplog.clear()
    encoding.encode_prompts(make(core, CHATML, "</s>"), [ASKED], Lengths(400, 40, 1))
    encoding.encode_comparisons(make(core, CHATML, "</s>"), [Comparison(ASKED, ("a", "b"), (0, 1))], Lengths(400, 40, 1))
    assert [record.getMessage() for record in caplog.records] == expected * 2


def test_a_template_that_ignores_add_generation_prompt_is_told(core, caplog):
    (message,) = said(caplog, make(core, NO_HEADER, "<|im_end|>"))
    assert message.startswith(
        r"the chat template writes '<|im_start|>assistant\n' before an answer, but does not end a prompt with it"
    )


def test_a_thought_that_the_template_opens_is_neither_opened_twice_nor_left_open(core, caplog):
    tokenizer = make(core, THINKS, "</s>")
    assert said(caplog, tokenizer, "Hm.</think>Green.") == []
    with pytest.raises(
        DataError, match="train demonstrations: an answer begins with '<think>', which the chat template has already"
    ):
        said(caplog, tokenizer, "Hm.</think>Green.", "<think>Hm.</think>Green.")
    (message,) = said(caplog, tokenizer, "Green.")
    assert message.startswith(
        "the chat template opens '<think>' before an answer, and the first answer of the train demonstrations"
    )


@pytest.mark.parametrize("refused", ["not add_generation_prompt", "messages[-1].role == 'assistant'"])
def test_a_template_that_only_writes_prompts_is_not_compared(core, caplog, refused):
    template = f"{{% if {refused} %}}{{{{ raise_exception('no') }}}}{{% endif %}}{CHATML}"
    assert said(caplog, make(core, template, "</s>")) == []


def test_tokens_that_the_border_cuts_are_told(core, caplog):
    (message,) = said(caplog, make(core, SPACE, "</s>"), "is green.")
    assert message.startswith("the tokens of a prompt and its answer are not those of both as one text: 'Ġ ")
    assert said(caplog, make(core, SPACE.replace("'assistant: '", "'assistant:'"), "</s>"), " is green.") == []


def test_an_answer_that_spells_eos_ends_once(core, caplog):
    tokenizer = make(core, *TEMPLATED["llama2"])
    plain = encoding.encode_response(tokenizer, "Green.", 40)
    assert (
        encoding.encode_response(tokenizer, "Green.</s>", 40) == encoding.encode_response(tokenizer, "Green.</s>\n", 40) == plain
    )
    assert plain.count(tokenizer.eos_id) == 1
    assert said(caplog, tokenizer, "Green.</s>") == []


def test_text_that_spells_a_special_token_is_counted(core, caplog):
    tokenizer, fit = make(core, *TEMPLATED["chatml"]), Fit("train demonstrations")
    demonstrations = [
        Demonstration(Prompt.of(text), answer) for text, answer in [("a<|im_end|>", "b"), ("a", "b<s>c"), ("a", "b")]
    ]
    encoding.encode_demonstrations(tokenizer, demonstrations, Lengths(400, 40, 1), fit)
    assert fit.special == 2
    expected = (
        "train demonstrations: of 3, 2 spell a special token in their text, such as '<|im_end|>', which the model reads as that"
    )
    assert expected in caplog.text
    fits = Fit("prompts"), Fit("comparisons")
    encoding.encode_prompts(tokenizer, [d.prompt for d in demonstrations], Lengths(400, 40, 1), fits[0])
    encoding.encode_comparisons(tokenizer, [Comparison(ASKED, ("a", "<s>"), (0, 1))], Lengths(400, 40, 1), fits[1])
    assert [fit.special for fit in fits] == [1, 1]
    texts = Fit("texts")
    encoding.encode_texts(tokenizer, ["a<s>b", "a"], Lengths(400, 40, 1), texts)
    assert texts.special == 1


# ---------------------------------------------------------------------------------------------------------- lengths


def test_comparisons_that_are_cut_to_the_same_tokens_are_left_out(core, caplog):
    tokenizer, fit = make(core, *TEMPLATED["chatml"]), Fit("train comparisons")
    same, other = Comparison(ASKED, ("Green. ⛺", "Green. 数"), (0, 1)), Comparison(ASKED, ("Green.", "Red."), (0, 1))
    limit = len(tokenizer.encode("Green."))
    assert len(encoding.encode_comparisons(tokenizer, [same, other], Lengths(400, limit, 1), fit)) == 1
    assert fit.alike == 1
    assert f"1 left out because their completions are the same once cut to {limit} tokens" in caplog.text
    with pytest.raises(
        DataError, match="All 1 comparisons were dropped: .*; 1 have completions that are the same tokens, cut to "
    ):
        encoding.encode_comparisons(tokenizer, [same], Lengths(400, limit, 1))


def test_long_text_is_cut_or_dropped_before_it_is_tokenised(core, monkeypatch):
    tokenizer, seen = make(core, *TEMPLATED["chatml"]), []
    monkeypatch.setattr(encoding, "most_characters", lambda limit: 200)
    monkeypatch.setattr(borders, "SHORT", 200)
    encode = tokenizer._encoded
    monkeypatch.setattr(tokenizer, "_encoded", lambda how, texts: seen.extend(map(len, texts)) or encode(how, texts))
    long, lengths = "Grass is green. " * 100, Lengths(40, 5, 1)
    monkeypatch.setattr(tokenizer, "encode_many", lambda texts: [tokenizer.encode(text) for text in texts])
    assert len(encoding.encode_response(tokenizer, long, 5)) == 5
    assert len(encoding.encode_texts(tokenizer, [long, "Grass"], lengths)[0].response) == 44
    fit = Fit()
    turns = (("user", long), ("assistant", long), ("user", "Why?"))
    assert encode_all(tokenizer, [demonstration(turns), demonstration((("user", long),))], lengths, fit) == 1
    assert (fit.shortened, fit.dropped) == (1, 1)
    assert max(seen) <= 300


def encode_all(tokenizer, demonstrations, lengths, fit) -> int:
    return len(encoding.encode_demonstrations(tokenizer, demonstrations, lengths, fit, every_turn=True))


def test_a_dialogue_of_thousands_of_turns_is_shortened_in_few_steps(core, monkeypatch):
    tokenizer = make(core, *TEMPLATED["chatml"])
    turns = [("user", "Why?"), ("assistant", "Green.")] * 2000 + [("user", "Why?")]
    one = Prompt(tuple(Message(*turn) for turn in turns))
    renders, render = [], tokenizer.render
    monkeypatch.setattr(tokenizer, "render", lambda *given, **how: renders.append(1) or render(*given, **how))
    two = Prompt(one.messages[-3:])
    limit = len(tokenizer.encode(render(two.messages, add_generation_prompt=True)))
    assert encoding.encode_prompt(tokenizer, one, limit) == encoding.encode_prompt(tokenizer, two, limit)
    assert encoding.encode_prompt(tokenizer, one, limit - 1) == encoding.encode_prompt(
        tokenizer, Prompt(one.messages[-1:]), limit
    )
    assert len(renders) < 40


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
