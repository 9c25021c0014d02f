"""The tokenizer: text there and back, special tokens, chat templates, and the same as transformers where it matters."""

import json

import jinja2
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lockstep.errors import ConfigError
from lockstep.nouns import Message
from lockstep.tokenizer import Tokenizer, TokenizerConfig, fetch

EOS, PAD, START = "<|im_end|>", "<|pad|>", "<|im_start|>"
TEXTS = [
    "Grass is green.",
    "  Zwei\n\nZeilen\tund ein Zelt ⛺, 数字 42 ",
    "Human: Hi\n\nAssistant: Hello",
    f"{START}user\nHi{EOS}",
    "",
]
DIALOGUE = (
    Message("system", "Be brief."),
    Message("user", "Is 1 < 2 & 'b'?"),
    Message("assistant", " Yes. "),
    Message("user", "Why?"),
)

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = """
{% if messages[0]['role'] == 'system' %}
    {% set system = messages[0]['content'] %}
    {% set rest = messages[1:] %}
{% else %}
    {% set rest = messages %}
{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- '[INST] ' + (system ~ '\\n' if loop.first and system is defined else '') + message['content'].strip() + ' [/INST]' }}
    {% else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}
"""
"""Llama 2's rules in the indented style of newer templates, which lean on trim_blocks and lstrip_blocks."""
AS_JSON = "{% for m in messages %}{{ m | tojson }}{{ '\n' }}{% endfor %}{{ add_generation_prompt | tojson }}"


@pytest.fixture(scope="session")
def core() -> tokenizers.Tokenizer:
    """A small byte-level BPE; like Llama's, it would put a BOS before every text if it were allowed to."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", START, EOS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def make(core, *, eos_token=EOS, pad_token=PAD, chat_template=SMOLLM) -> Tokenizer:
    return Tokenizer(core, eos_token=eos_token, pad_token=pad_token, chat_template=chat_template)


def write_folder(folder, core, settings, **files):
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, text in files.items():
        (folder / f"{name}.jinja").write_text(text)
    return folder


# ---------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("text", TEXTS[:3] + TEXTS[4:])
def test_text_survives_encoding_and_decoding(core, text):
    tokenizer = make(core)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_special_token_is_added_but_those_the_text_spells_are_read(core):
    tokenizer = make(core)
    assert core.encode("Hi").tokens[0] == "<s>"  # what the core would do on its own
    ids = tokenizer.encode(f"{START}Hi{EOS}")
    assert (ids[0], ids[-1]) == (core.token_to_id(START), tokenizer.eos_id)
    assert tokenizer.encode("Hi") == ids[1:-1]


def test_decoding_leaves_out_special_tokens_and_padding(core):
    tokenizer = make(core)
    ids = [core.token_to_id(START), *tokenizer.encode("Hi"), tokenizer.eos_id, tokenizer.pad_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "Hi"


def test_many_texts_are_encoded_as_each_alone(core):
    tokenizer = make(core)
    assert tokenizer.encode_many(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


# ------------------------------------------------------------------------------------------------------ special tokens


def test_a_pad_token_outside_the_vocabulary_gets_the_next_id(core):
    tokenizer = make(core)
    assert tokenizer.pad_id == tokenizer.vocab_size == core.get_vocab_size()
    assert make(core, pad_token=None).pad_token == PAD


def test_a_pad_token_of_the_vocabulary_keeps_its_id(core):
    assert make(core, pad_token=START).pad_id == core.token_to_id(START)


def test_padding_with_eos_is_refused_with_what_to_set(core):
    with pytest.raises(ConfigError) as error:
        make(core, pad_token=EOS)
    assert str(error.value) == (
        "The tokenizer pads with '<|im_end|>', which is also its EOS '<|im_end|>': EOS would be masked as padding, and the "
        "policy would never learn to stop. Give it a pad token of its own, one that never occurs in text: "
        "policy.tokenizer.pad_token='<|pad|>' (it need not be in the vocabulary; special tokens here: <s>, <|im_end|>, "
        "<|im_start|>)."
    )


def test_an_unknown_eos_suggests_the_nearest(core):
    with pytest.raises(ConfigError, match=r"eos_token '<\|im_ende\|>' is not in the vocabulary. Did you mean '<\|im_end\|>'?"):
        make(core, eos_token="<|im_ende|>")


# ------------------------------------------------------------------------------------------------------ chat templates


def test_the_dialogue_template_is_the_format_of_hh(core):
    rendered = make(core, chat_template="dialogue")
    tokenizer = Tokenizer(core, eos_token=EOS, pad_token=PAD, chat_template=None)
    del rendered
    with pytest.raises(ConfigError, match="This tokenizer has no chat template.*one of: dialogue, plain."):
        tokenizer.render(DIALOGUE, add_generation_prompt=True)


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("template", [SMOLLM, STRICT, AS_JSON], ids=["smollm", "strict", "json"])
@pytest.mark.parametrize("messages", [DIALOGUE, DIALOGUE[1:], DIALOGUE[:2]], ids=["system", "no system", "short"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(core, transformers, template, messages, add_generation_prompt):
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=PAD, chat_template=template)
    expected = theirs.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    assert make(core, chat_template=template).render(messages, add_generation_prompt=add_generation_prompt) == expected
