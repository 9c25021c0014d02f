"""The tokenizer: text there and back, special tokens, chat templates, and the same as transformers where it matters."""

import datetime
import json
import re
import signal
import subprocess
import sys

import huggingface_hub
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lockstep.errors import ConfigError, DataError
from lockstep.storage.sources import fetch_file
from lockstep.text import templates
from lockstep.text.templates import TEMPLATES, template_text
from lockstep.text.tokenizer import Tokenizer, TokenizerConfig
from lockstep.types import Message

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


def make(core, *, eos_token=EOS, pad_token=PAD, chat_template=SMOLLM, date=None) -> Tokenizer:
    return Tokenizer(core, eos_token=eos_token, pad_token=pad_token, chat_template=chat_template, bos_token="<s>", date=date)


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
        "The tokenizer pads with '<|im_end|>', which is also its EOS '<|im_end|>': EOS would be masked as padding, and "
        "the policy would never learn to stop. Give it a separate pad token that never occurs in text: "
        "policy.tokenizer.pad_token=\"'<|pad|>'\" (it need not be in the vocabulary; special tokens here: <s>, <|im_end|>, "
        "<|im_start|>)."
    )


def test_an_unknown_eos_suggests_the_nearest(core):
    with pytest.raises(ConfigError, match=r"eos_token '<\|im_ende\|>' is not in the vocabulary. Did you mean '<\|im_end\|>'?"):
        make(core, eos_token="<|im_ende|>")


# ------------------------------------------------------------------------------------------------------ chat templates


def test_the_dialogue_template_writes_the_format_of_hh(core):
    tokenizer = make(core, chat_template=TEMPLATES["dialogue"])
    dialogue = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye"))
    expected = "<s>\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye"
    assert tokenizer.render(dialogue, add_generation_prompt=False) == expected
    assert tokenizer.render(dialogue, add_generation_prompt=True) == expected + "\n\nAssistant:"


def test_the_plain_template_writes_nothing_but_bos_and_the_text(core):
    tokenizer = make(core, chat_template=TEMPLATES["plain"])
    assert tokenizer.render((Message("user", "Grass is"),), add_generation_prompt=True) == "<s>Grass is"


def test_without_a_template_the_error_lists_the_named_ones(core):
    with pytest.raises(ConfigError) as error:
        make(core, chat_template=None).render(DIALOGUE, add_generation_prompt=True)
    assert str(error.value) == (
        "This tokenizer has no chat template. Set policy.tokenizer.chat_template to a .jinja file, to jinja text or to one of: "
        "dialogue, plain."
    )


def test_what_a_template_refuses_is_a_configuration_error(core):
    twice = (Message("user", "Hi"), Message("user", "Ho"))
    with pytest.raises(ConfigError, match="The chat template fails on this dialogue: roles must alternate"):
        make(core, chat_template=STRICT).render(twice, add_generation_prompt=True)


def test_templates_are_sandboxed(core):
    with pytest.raises(ConfigError, match="is unsafe"):
        make(core, chat_template="{{ ''.__class__.__mro__ }}").render(DIALOGUE, add_generation_prompt=True)


ENDLESS = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "it does not end within 0.2 seconds",
    "{% for i in range(99999) %}{{ messages }}{% endfor %}": "it writes more than 30,150 characters",
    "{{ 'a' * 99999999 }}": "the result of its '*' is too large",
    "{{ 9 ** 9999 }}": "the result of its '**' is too large",
    "{{ 'a' | center(9999999999) }}": "it has a number over 1,000,000,000",
    "{{ '%9999999999d' % 1 }}": "it pads to a width over 1,000,000,000",
}


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_does_not_end_is_stopped(core, monkeypatch, template):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    monkeypatch.setattr(templates, "CHARACTERS", 30_000)
    timers = signal.getsignal(signal.SIGVTALRM), signal.getitimer(signal.ITIMER_VIRTUAL)
    with pytest.raises(ConfigError, match=re.escape(f"The chat template was stopped: {ENDLESS[template]}. Set policy")):
        make(core, chat_template=template).render((Message("user", "Why? Why so?" + "!" * 3),), add_generation_prompt=True)
    assert timers == (signal.getsignal(signal.SIGVTALRM), signal.getitimer(signal.ITIMER_VIRTUAL))


def test_a_profiler_that_ticks_meanwhile_goes_on(core):
    """libtpu's has a handler in C; `signal.signal` gives None for it, and cannot put it back."""
    signal.signal(signal.SIGPROF, lambda *_: None)
    signal.setitimer(signal.ITIMER_PROF, 1000, 1000)
    try:
        make(core, chat_template="{{ messages[0].content }}").render((Message("user", "Why?"),), add_generation_prompt=True)
        assert signal.getitimer(signal.ITIMER_PROF)[1] == 1000
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)


def test_a_template_that_takes_too_much_memory_is_stopped(core, monkeypatch):
    monkeypatch.setattr(templates, "MEMORY", -1)  # already too much, at the first look
    with pytest.raises(ConfigError, match="The chat template was stopped: it takes more than -1 MB of memory."):
        make(core, chat_template=next(iter(ENDLESS))).render(DIALOGUE, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template, says",
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ 'a' + none }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content.strip }}", "it writes the function 'strip' itself. Are its () missing?"),
        ("{{ [1, 2] | random }}", "No filter named 'random'"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
    ],
)
def test_whatever_a_template_raises_or_leaves_to_chance_is_a_configuration_error(core, template, says):
    with pytest.raises(ConfigError, match="The chat template .*" + re.escape(says)):
        make(core, chat_template=template).render(DIALOGUE, add_generation_prompt=True)


def test_a_template_is_told_the_same_date_every_day_and_says_so_once(core, tmp_path, caplog):
    template = "{{ strftime_now('%d %b %Y') }}"
    tokenizer = make(core, chat_template=template)
    assert [tokenizer.render(DIALOGUE, add_generation_prompt=ready) for ready in (True, False)] == ["26 Jul 2024"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "the chat template writes the date: it is told 2024-07-26. To change it, set policy.tokenizer.date"
    ]
    other = tokenizer.replaced(TokenizerConfig(date="2026-01-02"))
    assert other.render(DIALOGUE, add_generation_prompt=True) == "02 Jan 2026"
    other.save(tmp_path)
    assert Tokenizer.load(tmp_path).render(DIALOGUE, add_generation_prompt=True) == "02 Jan 2026"
    assert Tokenizer.load(tmp_path, TokenizerConfig(date="2025-01-02")).date == "2025-01-02"
    with pytest.raises(ConfigError, match="policy.tokenizer.date='today' should be a date like 2024-07-26."):
        make(core, date="today")


def test_half_a_character_is_no_text(core):
    for encode in (make(core).encode, lambda text: make(core).encode_many(["Hi", text])):
        with pytest.raises(DataError, match=r"A text holds half a character, .* near 'Hi .ud83d'."):
            encode("Hi \ud83d")


def test_a_word_that_the_tokenizer_does_not_know_is_an_error_of_the_data():
    core = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}))
    tokenizer = Tokenizer(core, eos_token="<eos>", pad_token=None, chat_template=None)
    with pytest.raises(DataError, match="The tokenizer cannot encode a text: .*UNK"):
        tokenizer.encode("b")


@pytest.mark.parametrize(
    ("model", "unknown"),
    [
        (models.WordLevel({"a": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"), ["bb", "ä"]),
        (models.BPE({"a": 0, "<eos>": 1, "<unk>": 2}, [], unk_token="<unk>"), ["b", "b", "ä"]),
        (models.WordLevel({"a": 0, "<eos>": 1, "bb": 2, "ä": 3, "<unk>": 4}, unk_token="<unk>"), []),
        (models.Unigram([("a", 0.0), ("<eos>", 0.0), ("<unk>", 0.0)], unk_id=2), []),
    ],
)
def test_unknown_words_are_those_that_become_the_unknown_token(model, unknown):
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<eos>", "<unk>"])
    tokenizer = Tokenizer(core, eos_token="<eos>", pad_token=None, chat_template=None)
    assert tokenizer.unknown_words("a bb <unk> ä a <eos>") == unknown


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")


def render_as_transformers(transformers, core, template, messages, add_generation_prompt):
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=EOS, pad_token=PAD, chat_template=template
    )
    records = [{"role": m.role, "content": m.content} for m in messages]
    return theirs.apply_chat_template(records, tokenize=False, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("template", [SMOLLM, STRICT, AS_JSON], ids=["smollm", "strict", "json"])
@pytest.mark.parametrize("messages", [DIALOGUE, DIALOGUE[1:], DIALOGUE[:2]], ids=["system", "no system", "short"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(core, transformers, template, messages, add_generation_prompt):
    expected = render_as_transformers(transformers, core, template, messages, add_generation_prompt)
    assert make(core, chat_template=template).render(messages, add_generation_prompt=add_generation_prompt) == expected


TOJSON = "", "ensure_ascii=False", "ensure_ascii=True", "True", "False, 2", "indent=2, sort_keys=True", "separators=(',', ':')"
EXTRAS = {
    "bos_token": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "tools are none": "{% if tools is not none %}TOOLS{% endif %}",
    "break": "{% for m in messages %}{{ m.content }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "strftime_now": "{{ strftime_now('%Y') }}",
    **{f"tojson({given})": "{{ {'b': '⛺ <', 'a': [1]} | tojson(" + given + ") }}" for given in TOJSON},
}
"""What transformers gives to templates besides, and templates on the hub rely on."""


@pytest.mark.parametrize("template", EXTRAS.values(), ids=EXTRAS)
def test_what_transformers_offers_to_templates_is_there(core, transformers, template):
    expected = render_as_transformers(transformers, core, template, DIALOGUE, False)
    today = datetime.date.today().isoformat()
    assert make(core, chat_template=template, date=today).render(DIALOGUE, add_generation_prompt=False) == expected


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("pad_token", [PAD, "<s>"], ids=["new pad token", "pad token of the vocabulary"])
def test_transformers_opens_what_was_saved_and_agrees(core, transformers, tmp_path, pad_token):
    ours = make(core, pad_token=pad_token)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs(text, add_special_tokens=False).input_ids for text in TEXTS] == ours.encode_many(TEXTS)
    assert (theirs.eos_token_id, theirs.eos_token, theirs.chat_template) == (ours.eos_id, EOS, SMOLLM)
    known = pad_token != PAD  # transformers would give another the next id, which no embedding has
    assert (theirs.pad_token_id, theirs.pad_token) == ((ours.pad_id, pad_token) if known else (None, None))


def test_what_transformers_saved_is_opened(core, transformers, tmp_path):
    """It writes the template to a file of its own."""
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=PAD, chat_template=SMOLLM)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    ours = Tokenizer.load(tmp_path)
    assert (ours.eos_token, ours.pad_id, ours.chat_template) == (EOS, theirs.pad_token_id, SMOLLM)
    assert ours.encode_many(TEXTS) == [theirs(text, add_special_tokens=False).input_ids for text in TEXTS]


def test_saving_and_loading_changes_nothing(core, tmp_path):
    ours = make(core)
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for name in ("eos_token", "eos_id", "pad_token", "pad_id", "vocab_size", "chat_template"):
        assert getattr(again, name) == getattr(ours, name)
    assert again.encode_many(TEXTS) == ours.encode_many(TEXTS)


def test_special_tokens_may_be_records_and_templates_named(core, tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    settings = {"eos_token": {"content": EOS, "special": True}, "pad_token": PAD, "chat_template": named}
    tokenizer = Tokenizer.load(write_folder(tmp_path, core, settings))
    assert (tokenizer.eos_token, tokenizer.chat_template) == (EOS, "yes")


def test_the_configuration_replaces_what_the_files_say(core, tmp_path):
    folder = write_folder(tmp_path, core, {"eos_token": EOS, "pad_token": EOS, "chat_template": SMOLLM})
    config = TokenizerConfig(path=None, eos_token=START, pad_token="<|nothing|>", chat_template="dialogue")
    tokenizer = Tokenizer.load(folder, config)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (START, "<|nothing|>")
    assert tokenizer.chat_template == TEMPLATES["dialogue"]
    assert template_text("{{ messages }}") == "{{ messages }}"


def test_a_chat_template_may_be_a_file(core, tmp_path):
    folder = write_folder(tmp_path, core, {"eos_token": EOS, "chat_template": "own"})
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}⛺ {{ m.content }}{% endfor %}", encoding="utf-8")
    given = str(tmp_path / "mine.jinja")
    config = TokenizerConfig(path=None, eos_token=None, pad_token=None, chat_template=given)
    for tokenizer in (Tokenizer.load(folder, config), make(core).replaced(config)):
        assert tokenizer.render(DIALOGUE[1:2], add_generation_prompt=True) == "⛺ Is 1 < 2 & 'b'?"
        assert (tokenizer.eos_token, tokenizer.vocab_size) == (EOS, make(core).vocab_size)
    with pytest.raises(ConfigError) as error:
        template_text(str(tmp_path / "mien.jinja"))
    missing = f"there is no file {tmp_path}/mien.jinja. Did you mean '{tmp_path}/mine.jinja'?"
    assert str(error.value) == f"policy.tokenizer.chat_template: {missing}"


def test_a_chat_template_that_is_no_template_is_an_error():
    with pytest.raises(ConfigError) as error:
        template_text("dialog")
    assert str(error.value) == (
        "policy.tokenizer.chat_template='dialog' is not a .jinja file, not jinja text and not one of dialogue, plain. "
        "Did you mean 'dialogue'?"
    )


def test_a_tokenizer_keeps_what_the_configuration_leaves_alone(core):
    nothing = TokenizerConfig(path=None, eos_token=None, pad_token=None, chat_template=None)
    own, same = make(core), make(core).replaced(nothing)
    for name in ("eos_id", "pad_id", "pad_token", "bos_token", "start_id", "chat_template", "core"):
        assert getattr(same, name) == getattr(own, name), name


def test_the_padding_and_truncation_that_a_file_asks_for_are_off(core, tmp_path):
    write_folder(tmp_path, core, {"eos_token": EOS})
    stored = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.enable_padding(length=8, pad_token=START)
    stored.enable_truncation(2)
    stored.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode(TEXTS[1]) == make(core).encode(TEXTS[1])


def test_files_without_an_eos_say_which_key_to_set(core, tmp_path):
    with pytest.raises(ConfigError, match="names no EOS token. Set policy.tokenizer.eos_token."):
        Tokenizer.load(write_folder(tmp_path, core, {}))


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(ConfigError, match="has no tokenizer.json: no such file."):
        Tokenizer.load(tmp_path)
    assert fetch_file(tmp_path, "chat_template.jinja", optional=True) is None


def test_a_hub_that_does_not_answer_is_not_said_to_lack_the_file(monkeypatch):
    def download(*_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("lockstep.storage.hub._answers", lambda minute: True)
    with pytest.raises(ConfigError, match="'some/where' is not a local folder, and the hub does not answer: offline"):
        fetch_file("some/where", "tokenizer.json")


def test_of_two_templates_the_one_in_its_own_file_counts(core, tmp_path):
    folder = write_folder(tmp_path, core, {"eos_token": EOS, "chat_template": "settings"}, chat_template="file")
    assert Tokenizer.load(folder).chat_template == "file"


def test_importing_the_tokenizer_imports_no_array_library():
    code = "import sys, lockstep.text.tokenizer; print([m for m in ('torch', 'jax', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
