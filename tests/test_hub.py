"""The Hugging Face hub when nobody answers: an error within seconds, or what the cache has."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from lockstep.data.reading import Source, read_rows
from lockstep.errors import CheckpointError, ConfigError, Unreachable
from lockstep.storage import hub as module
from lockstep.storage.hub import hub
from lockstep.storage.sources import fetch_file, fetch_folder

SILENT = "https://huggingface.co does not answer, and the cache does not have it"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The addresses that were asked; nobody answers. The cache is empty."""
    found = []
    assert huggingface_hub.HfApi and huggingface_hub.snapshot_download  # import them: they have the real session

    def head(address, timeout):
        found.append(address)
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    module._answers.cache_clear()
    yield found
    module._answers.cache_clear()


def test_without_a_network_every_way_to_the_hub_ends_at_once_and_says_so(asked):
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=f"'nobody/nothing' is neither a folder nor .*: {SILENT}"):
        fetch_folder("nobody/nothing")
    with pytest.raises(ConfigError, match=f"'nobody/nothing' is not a local folder, and .*: {SILENT}"):
        fetch_file("nobody/nothing", "tokenizer.json")
    with pytest.raises(Unreachable, match=f"'nobody/nothing' is not a local file or folder, .*: {SILENT}. A local path works"):
        list(read_rows(Source("nobody/nothing")))
    assert len(asked) == 1 and time.perf_counter() - started < 10  # most of it to import datasets
    assert constants.HF_HUB_OFFLINE is False and sys.modules["datasets"].config.HF_HUB_OFFLINE is False


def test_transformers_does_not_ask_either(asked):
    pytest.importorskip("torch")
    from lockstep_torch.classifier import TextClassifier

    with pytest.raises(CheckpointError, match=f"'nobody/nothing' is neither a folder nor a reachable hub repository: {SILENT}"):
        TextClassifier.load("nobody/nothing", None)
    assert len(asked) == 1


def test_what_is_in_the_cache_opens_without_a_network(asked, tmp_path):
    commit = "0123456789" * 4
    folder = tmp_path / "hub" / "models--some--model"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "tokenizer.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    assert fetch_file("some/model", "tokenizer.json").read_text() == "{}"


def test_it_is_asked_again_after_a_minute(asked, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for now[0] in (0.0, 30.0, 61.0, 62.0):
        with hub("nobody/nothing"):
            assert constants.HF_HUB_OFFLINE is True
    assert len(asked) == 2 and constants.HF_HUB_OFFLINE is False


def test_a_hub_that_answers_is_asked_and_its_own_error_is_told(asked, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=lambda *_, **__: "403"))

    def download(*_, **__):
        assert constants.HF_HUB_OFFLINE is False
        raise OSError("401: the repository is gated")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match="401: the repository is gated"):
        fetch_folder("nobody/nothing")


def test_whoever_is_offline_on_purpose_is_not_sent_to_the_hub(asked, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, and the cache does not have it"):
        fetch_folder("nobody/nothing")
    assert asked == [] and constants.HF_HUB_OFFLINE is True


def test_a_folder_is_opened_without_asking(asked, tmp_path):
    with hub(tmp_path) as why:
        assert why(error := OSError("damaged")) is error
    assert fetch_folder(tmp_path) == tmp_path and asked == []


def test_what_is_wrong_with_a_name_or_a_file_is_told_without_a_network_too(asked):
    with pytest.raises(CheckpointError, match="Repo id must"):
        fetch_folder("a//b/c")
