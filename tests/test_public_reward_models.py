"""Sequence classifiers as transformers writes them, as reward models: scores equal to transformers' own forward pass."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers

from conftest import BACKENDS, WORDS
from lockstep.commands.run import run_config
from lockstep.config.compose import compose
from lockstep.config.schema import parse
from lockstep.errors import CheckpointError, ConfigError, RewardError
from lockstep.interfaces import Responses
from lockstep.registry import registry
from lockstep.runs.assembly import Assembly
from lockstep.runs.experiment import Experiment
from lockstep.storage.files import read_json, write_json
from lockstep.storage.records import MADE_BY
from lockstep.storage.weights import read_tensors, write_tensors
from lockstep.text.sequences import pack
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Message, Prompt
from lockstep_rlhf.reward_models.learned import Learned, rendered
from lockstep_torch.classifier import TextClassifier
from runs import DECODER, TINY

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "<user>", "<assistant>", "<system>", "<end>", "\n"]
SIZES = {"vocab_size": 64, "max_position_embeddings": 48, "num_labels": 1}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_tokenizer(folder, template, pair: bool):
    """Word level, with other ids than the policy's; of encoders '[CLS] a [SEP] b [SEP]'."""
    words = [*SPECIAL, *reversed(WORDS)]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    core.add_special_tokens(SPECIAL)
    if pair:
        core.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]" if pair else "<end>", eos_token="<end>", cls_token="[CLS]", sep_token="[SEP]",
        unk_token="[UNK]", chat_template=template,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


def write_model(folder, name: str, **changes):
    """A random model of a family, with weights as large as trained ones."""
    torch.manual_seed(1)
    configs = {
        "Llama": lambda: transformers.LlamaConfig(**SIZES, **SMALL, num_key_value_heads=2),
        "Qwen2": lambda: transformers.Qwen2Config(**SIZES, **SMALL, num_key_value_heads=2),
        "GPT2": lambda: transformers.GPT2Config(vocab_size=64, n_positions=48, n_embd=32, n_layer=2, n_head=4, num_labels=1),
        "Bert": lambda: transformers.BertConfig(**SIZES, **SMALL),
        "Roberta": lambda: transformers.RobertaConfig(**SIZES, **SMALL, pad_token_id=0),
        "DebertaV2": lambda: transformers.DebertaV2Config(
            **SIZES, **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0
        ),
    }
    config = configs[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    config.pad_token_id = 7 if name in ("Llama", "GPT2", "Qwen2") else 0
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    return model


class Public:
    """A checkpoint in a folder, what transformers says of it, and the resources of a run on one backend."""

    def __init__(self, folder, name, backend, policys, *, template=CHAT):
        self.folder, self.encoder = folder, name in ("Bert", "Roberta", "DebertaV2")
        self.model = write_model(folder, name)
        self.tokenizer = write_tokenizer(folder, template, pair=self.encoder)
        self.resources = resources(backend, policys)

    def reward_model(self, **settings):
        values = {"source": str(self.folder), "micro_batch_size": 2, "chat_template": None} | settings
        return Learned(parse(Learned.Config, values, "reward_model"), self.resources)

    @torch.no_grad()
    def expected(self, *text):
        """transformers' score of one text (or pair), alone and unpadded."""
        return self.model(**self.tokenizer(*text, return_tensors="pt")).logits[0, 0].item()


def resources(backend, policys):
    """As a run has them, `Assembly` proper, without its experiment."""
    made = Assembly(SimpleNamespace(backend_name=backend.name, stages={}), {})
    made.__dict__ |= {"backend": backend, "tokenizer": policys}
    return made


@pytest.fixture(scope="module")
def torch_backend():
    cls = registry().resolve("backend", "torch", "torch")
    return cls(parse(cls.Config, BACKENDS["torch"], "backend"))


ROWS = [("w1 w2", "w5 w6 w7", True), ("w3", "w8", True), ("w1 w4 w9 w2", "w5 w3", False)]


def responses(tokenizer, rows=ROWS, extra=0):
    """The policy's: `extra` columns of padding on both sides."""
    ids = [tokenizer.encode(p) for p, _, _ in rows]
    written = [tokenizer.encode(text) + [tokenizer.eos_id] * ended for _, text, ended in rows]
    columns = {"prompt_columns": max(map(len, ids)) + extra, "response_columns": max(map(len, written)) + extra}
    return Responses(
        [Prompt.of(p) for p, _, _ in rows],
        [text for _, text, _ in rows],
        pack(ids, written, tokenizer.pad_id, **columns),
        tokenizer,
    )


# ------------------------------------------------------------------------------------------------------------- decoders


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_public_decoder_scores_whole_dialogues_in_its_own_template_as_transformers_does(tmp_path, name, backend, tokenizer):
    public = Public(tmp_path, name, backend, tokenizer)
    expected = [
        public.expected("<user> w1 w2 <end>\n<assistant> w5 w6 w7 <end>\n"),
        public.expected("<user> w3 <end>\n<assistant> w8 <end>\n"),
        public.expected("<user> w1 w4 w9 w2 <end>\n<assistant> w5 w3"),  # cut: the policy did not end it
    ]
    assert np.ptp(expected) > 0.1
    scores = public.reward_model().score(responses(tokenizer))
    assert scores.dtype == np.float32 and scores == pytest.approx(expected, abs=1e-5)
    assert public.reward_model(micro_batch_size=None).score(responses(tokenizer, extra=5)) == pytest.approx(expected, abs=1e-5)


def test_a_public_decoder_of_another_family_works_on_torch(tmp_path, torch_backend, tokenizer):
    public = Public(tmp_path, "Qwen2", torch_backend, tokenizer)
    assert public.reward_model().score(responses(tokenizer))[1] == pytest.approx(
        public.expected("<user> w3 <end>\n<assistant> w8 <end>\n"), abs=1e-5
    )


def test_dialogues_of_several_turns_reach_a_public_model_whole(tmp_path, torch_backend, tokenizer):
    public = Public(tmp_path, "Llama", torch_backend, tokenizer)
    one = responses(tokenizer, ROWS[:1])
    turns = (Message("system", "w9"), Message("user", "w3"), Message("assistant", "w4"), Message("user", "w1 w2"))
    several = Responses([Prompt(turns)], one.texts, one.sequences, tokenizer)
    text = "<system> w9 <end>\n<user> w3 <end>\n<assistant> w4 <end>\n<user> w1 w2 <end>\n<assistant> w5 w6 w7 <end>\n"
    assert public.reward_model().score(several) == pytest.approx([public.expected(text)], abs=1e-5)


def test_shards_are_read_like_one_file(tmp_path, backend, tokenizer):
    public = Public(tmp_path, "Llama", backend, tokenizer)
    before = public.reward_model().score(responses(tokenizer))
    (tmp_path / "model.safetensors").unlink()
    public.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "model.safetensors.index.json").exists()
    np.testing.assert_array_equal(public.reward_model().score(responses(tokenizer)), before)


def test_a_public_decoder_without_a_template_says_what_to_set_and_takes_one_from_the_configuration(
    tmp_path, torch_backend, tokenizer
):
    public = Public(tmp_path, "Llama", torch_backend, tokenizer, template=None)
    with pytest.raises(
        ConfigError, match="has no chat template. Set reward_model.chat_template to jinja text or to one of: dialogue"
    ):
        public.reward_model()
    scores = public.reward_model(chat_template=CHAT).score(responses(tokenizer))
    assert scores[1] == pytest.approx(public.expected("<user> w3 <end>\n<assistant> w8 <end>\n"), abs=1e-5)


@pytest.mark.parametrize("pad_id", [7, 0, None])
def test_a_public_decoder_reads_its_score_at_the_last_token_that_is_not_its_pad_token(tmp_path, backend, tokenizer, pad_id):
    """7 is <end>, which closes the dialogue."""
    public = Public(tmp_path, "Llama", backend, tokenizer, template=CHAT.replace("\n", ""))
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | {"pad_token_id": pad_id})
    public.model.config.pad_token_id = pad_id
    expected = [
        public.expected("<user> w1 w2 <end><assistant> w5 w6 w7 <end>"),
        public.expected("<user> w3 <end><assistant> w8 <end>"),
        public.expected("<user> w1 w4 w9 w2 <end><assistant> w5 w3"),
    ]
    assert public.reward_model().score(responses(tokenizer)) == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def chatml(tokenizer):
    """The policy's tokenizer with a template that writes w33 after EOS, where ChatML writes a line break."""
    template = "{% for m in messages %}w31 {{ m.content }} <stop> w33 {% endfor %}{% if add_generation_prompt %}w31 {% endif %}"
    return Tokenizer(tokenizer.core, eos_token="<stop>", pad_token="<pad>", chat_template=template)


def test_a_public_decoder_with_the_policys_tokenizer_reads_what_its_template_writes_after_eos(tmp_path, backend, chatml):
    public = Public(tmp_path, "Llama", backend, chatml, template=None)
    chatml.save(tmp_path)
    public.tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    dialogues = [[{"role": "user", "content": p}, {"role": "assistant", "content": text}] for p, text, _ in ROWS[:2]]
    expected = [public.expected(public.tokenizer.apply_chat_template(d, tokenize=False)) for d in dialogues]
    assert public.reward_model().score(responses(chatml, ROWS[:2])) == pytest.approx(expected, abs=1e-5)


def test_a_public_decoder_with_the_policys_vocabulary_gives_a_value_network_that_reads_its_tokens(
    tmp_path, torch_backend, chatml
):
    public = Public(tmp_path, "Llama", torch_backend, chatml, template=None)
    chatml.save(tmp_path)
    rows = responses(chatml).sequences
    ids = [chatml.encode(p) + chatml.encode(text) + [chatml.eos_id] * ended for p, text, ended in ROWS]
    with torch.no_grad():
        hidden = [public.model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
        expected = [public.model.score(h).item() for h in hidden]
    network = public.reward_model().value_network()
    assert network.evaluate(rows, ["scores"])["scores"] == pytest.approx(expected, abs=1e-5)


def test_a_dialogue_too_long_for_a_public_decoder_has_no_score(tmp_path, torch_backend, tokenizer, caplog):
    public = Public(tmp_path, "Llama", torch_backend, tokenizer)
    scores = public.reward_model().score(responses(tokenizer, [("w1 " * 43, "w2", True), ROWS[1]]))
    assert np.isnan(scores[0]) and np.isfinite(scores[1]) and "1 responses are too long for the reward model" in caplog.text


@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_several_labels_are_refused_by_their_number(tmp_path, torch_backend, tokenizer, name):
    public = Public(tmp_path, name, torch_backend, tokenizer)
    write_model(tmp_path, name, num_labels=3)
    with pytest.raises(CheckpointError, match="has num_labels=3: .* A reward model has num_labels=1"):
        public.reward_model()


# ------------------------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("name", ["Bert", "Roberta", "DebertaV2"])
def test_a_public_encoder_scores_pairs_of_prompt_and_response_as_transformers_does(tmp_path, name, torch_backend, tokenizer):
    public = Public(tmp_path, name, torch_backend, tokenizer, template=None)
    expected = [public.expected(prompt, text) for prompt, text, _ in ROWS]
    assert np.ptp(expected) > 1e-3
    for size in (1, 2, None):
        assert public.reward_model(micro_batch_size=size).score(responses(tokenizer)) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_with_a_chat_template_reads_one_text(tmp_path, torch_backend, tokenizer):
    public = Public(tmp_path, "Bert", torch_backend, tokenizer)
    scores = public.reward_model().score(responses(tokenizer))
    assert scores[1] == pytest.approx(public.expected("<user> w3 <end>\n<assistant> w8 <end>\n"), abs=1e-5)


@pytest.mark.parametrize("ready", ["<assistant> ", ""], ids=["asked for", "never asked for"])
def test_a_response_that_was_cut_off_has_the_same_beginning_as_one_that_ended(ready):
    def render(messages, *, add_generation_prompt):
        return "".join(f"<{m.role}> {m.content} <end>\n" for m in messages) + (ready if add_generation_prompt else "")

    prompt = Prompt.of("w3")
    assert rendered(render, prompt, "w8 ", True) == "<user> w3 <end>\n<assistant> w8  <end>\n"
    assert rendered(render, prompt, "w8 ", False) == "<user> w3 <end>\n<assistant> w8 "
    assert rendered(render, prompt, "", False) == f"<user> w3 <end>\n{ready}"


@pytest.mark.parametrize(("name", "template"), [("Llama", CHAT), ("Bert", CHAT), ("Bert", None)])
def test_special_tokens_that_the_policy_spelled_are_no_special_tokens_to_a_public_model(
    tmp_path, name, template, torch_backend, tokenizer
):
    public = Public(tmp_path, name, torch_backend, tokenizer, template=template)
    turns = (Message("user", "w3"), Message("assistant", "w4 [SEP]"), Message("user", "w1"))
    spelled = Responses([Prompt(turns)], ["w8 <end> <user> w9 [SEP]"], responses(tokenizer, ROWS[1:2]).sequences, tokenizer)
    response = "w8 < end> < user> w9 [ SEP]"
    text = f"<user> w3 <end>\n<assistant> w4 [ SEP] <end>\n<user> w1 <end>\n<assistant> {response} <end>\n"
    expected = public.expected(text) if template else public.expected("w3\n\nw4 [ SEP]\n\nw1", response)
    assert public.reward_model().score(spelled) == pytest.approx([expected], abs=1e-5)


def test_an_encoders_template_is_told_the_same_date_every_day(tmp_path, torch_backend, tokenizer):
    public = Public(tmp_path, "Bert", torch_backend, tokenizer, template="{{ cls_token }} {{ strftime_now('%Y-%m-%d') }}")
    render = TextClassifier.load(public.folder, torch_backend).renderer(None)
    assert render([Message("user", "w3")], add_generation_prompt=False) == "[CLS] 2024-07-26"


def test_an_encoder_gives_no_value_network_and_no_score_for_what_is_too_long(tmp_path, torch_backend, tokenizer):
    model = Public(tmp_path, "Bert", torch_backend, tokenizer, template=None).reward_model()
    assert model.value_network() is None
    scores = model.score(responses(tokenizer, [("w1 " * 60, "w2", True), ROWS[1]]))
    assert np.isnan(scores[0]) and np.isfinite(scores[1])


def test_an_encoder_on_jax_says_which_backend_opens_it(tmp_path, tokenizer):
    pytest.importorskip("jax")
    cls = registry().resolve("backend", "jax", "jax")
    jax_backend = cls(parse(cls.Config, BACKENDS["jax"], "backend"))
    with pytest.raises(CheckpointError, match="no decoder with a scalar head .*backend=torch opens it"):
        Public(tmp_path, "Bert", jax_backend, tokenizer).reward_model()


def test_a_language_model_is_no_reward_model(tmp_path, torch_backend, tokenizer):
    public = Public(tmp_path, "Llama", torch_backend, tokenizer)
    transformers.LlamaForCausalLM(public.model.config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is not a reward model: its checkpoint has no score.weight"):
        public.reward_model()


def test_an_encoder_whose_layers_or_tokens_do_not_fit_is_refused(tmp_path, torch_backend, tokenizer):
    public = Public(tmp_path, "Bert", torch_backend, tokenizer, template=None)
    weights, name = read_tensors(tmp_path / "model.safetensors"), "bert.encoder.layer.1.attention.self.query.weight"
    write_tensors(tmp_path / "model.safetensors", {n: array for n, array in weights.items() if n != name})
    with pytest.raises(CheckpointError, match=f"do not fit its config.json: missing: {name}"):
        public.reward_model()
    write_tensors(tmp_path / "model.safetensors", weights | {name: weights[name] * np.inf})
    with pytest.raises(CheckpointError, match=f"NaN or Inf in 1 of its tensors: {name}"):
        public.reward_model()
    write_model(tmp_path, "Bert", vocab_size=40)
    with pytest.raises(ConfigError, match=r"The tokenizer does not fit '.*': .* embedding of 40 rows: 'w2' \(40\), 'w1' \(41\)"):
        public.reward_model()
    settings = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", settings | {"num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match="unused: bert.encoder.layer.1"):
        public.reward_model()


@pytest.mark.parametrize("made_by_a_stage", [False, True])
def test_a_reward_model_with_fewer_rows_than_the_policy_says_so_when_it_meets_one(
    tmp_path, torch_backend, chatml, made_by_a_stage
):
    public = Public(tmp_path, "Llama", torch_backend, chatml, template=None)
    chatml.save(tmp_path)
    if made_by_a_stage:
        write_json(tmp_path / MADE_BY, {"kind": "reward_model", "policy": "huggingface"})
    model, rows = public.reward_model(), responses(chatml)
    rows.sequences.tokens[1, -1] = 99  # padding may be anything
    rows.sequences.tokens[1, rows.sequences.prompt_length] = 64
    if not made_by_a_stage:  # it reads the text, and only the value network reads ids
        assert np.isfinite(model.score(rows)).all()
        model.value_network()
    with pytest.raises(RewardError, match="The policy wrote the token id 64, .* its embedding has 64 rows"):
        model.score(rows)


# ------------------------------------------------------------------------------------------------------------ whole runs


def test_a_hub_id_is_a_source_and_a_typo_of_a_stage_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    ppo = lambda source: Experiment(compose([*TINY, f"reward_model.source={source}"])).stages["ppo"]  # noqa: E731
    assert ("OpenAssistant/reward-model-deberta-v3-large-v2", "reward_model") in ppo(
        "OpenAssistant/reward-model-deberta-v3-large-v2"
    ).inputs
    with pytest.raises(ConfigError, match="'rewart'.* Did you mean 'reward'?.* a folder or a hub id, owner/name"):
        ppo("rewart")
    for path in ("runs/rewart", "./models/x", "a/b/c"):
        with pytest.raises(ConfigError, match=f"reads the stage '{path}', which does not come before it"):
            ppo(path)


@pytest.mark.parametrize("name", ["Llama", "DebertaV2"])
def test_ppo_runs_against_a_public_reward_model_and_says_where_its_value_network_comes_from(tmp_path, name, caplog):
    write_model(tmp_path / "public", name, max_position_embeddings=256)
    write_tokenizer(tmp_path / "public", None if name == "DebertaV2" else CHAT, pair=name == "DebertaV2")
    stages = "{ppo: {algorithm: ${algorithm}, policy: new, reward_model: ${reward_model}}}"
    overrides = ["~stages", f"+stages={stages}", f"reward_model.source={tmp_path / 'public'}", "algorithm.iterations=1"]
    with caplog.at_level("INFO", logger="lockstep"):
        run = run_config(compose([*TINY, *DECODER, *overrides, "backend.threads=1", f"folder={tmp_path / 'runs'}"]), "test")
    folder = run.parent / read_json(run / "run.json")["stages"]["ppo"]["folder"]
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(row["objective/score"]) and row["objective/dropped"] == 0
    assert "the value network starts from the policy with a zero head; algorithm.value_network=shared" in caplog.text


@pytest.mark.parametrize("name", ["Bert", "Roberta", "DebertaV2"])
def test_the_longest_text_that_is_scored_has_a_position_for_each_token(name, tmp_path, torch_backend):
    """RoBERTa's begin behind that of padding, so it has fewer than its configuration says."""
    write_model(tmp_path, name)
    write_tokenizer(tmp_path, None, pair=True)
    longest = 47 if name == "Roberta" else 48
    fits, too_long = (" ".join([WORDS[5]] * (count - 2)) for count in (longest, longest + 1))
    found = TextClassifier.load(tmp_path, torch_backend).score([fits, too_long])
    assert np.isfinite(found).tolist() == [True, False]
