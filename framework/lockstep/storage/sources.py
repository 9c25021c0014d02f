"""Where checkpoints come from: a folder, a GGUF file or a Hugging Face hub repository."""

from __future__ import annotations

from pathlib import Path

from lockstep.errors import CheckpointError, ConfigError
from lockstep.storage import gguf
from lockstep.storage.hub import hub


def fetch_folder(path: Path | str) -> Path:
    """The local folder of a checkpoint: the folder itself, the folder made from a GGUF file, or a hub repository downloaded into
    Hugging Face's cache. Pickles, code, subfolders and weights in other formats are not downloaded.

    Raises:
      CheckpointError: ``path`` is none of these.
    """
    path = gguf.as_folder(path)
    if Path(path).is_dir():
        return Path(path)
    import huggingface_hub

    wanted = {"allow_patterns": ["*.json", "*.safetensors", "*.jinja"], "ignore_patterns": ["*/*", "consolidated*"]}
    with hub(path) as why:
        try:
            return Path(huggingface_hub.snapshot_download(str(path), **wanted))
        except Exception as error:
            raise CheckpointError(f"'{path}' is neither a folder nor a reachable hub repository: {why(error)}") from error


def fetch_file(path: str | Path, name: str, *, optional: bool = False) -> Path | None:
    """A file of a checkpoint folder, or of a hub repository (downloaded into Hugging Face's cache).

    Raises:
      ConfigError: the checkpoint or the file does not exist.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        if file.exists():
            return file
        reason = "no such file"
    else:
        import huggingface_hub

        with hub(path) as why:
            try:
                return Path(huggingface_hub.hf_hub_download(str(path), name))
            except huggingface_hub.errors.LocalEntryNotFoundError as error:
                known = huggingface_hub.try_to_load_from_cache(str(path), name)
                if optional and known is huggingface_hub._CACHED_NO_EXIST:  # the hub said so before
                    return None
                raise ConfigError(f"'{path}' is not a local folder, and the hub does not answer: {why(error)}") from error
            except huggingface_hub.errors.EntryNotFoundError:
                reason = "the hub repository has no such file"
            except Exception as error:
                raise ConfigError(f"'{path}' is neither a folder nor a hub repository: {why(error)}") from error
    if optional:
        return None
    raise ConfigError(f"{path} has no {name}: {reason}.")
