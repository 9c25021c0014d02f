"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): y = W x + (alpha / rank) B A x, where W is frozen.

This module holds the parts that need no array library: an adapter's settings, initial weights and files. The files are peft's
(``adapter_config.json`` beside ``adapter_model.safetensors``), so an adapter from one backend opens in the other and in peft.
In memory, tensors are named after the checkpoint's layers that they adapt: ``<layer>.lora_A.weight`` [rank, inputs],
``<layer>.lora_B.weight`` [outputs, rank], and ``score.weight`` if there is a scalar head.

Left out: dropout on the adapter's input (training here uses 0; it has no effect on a loaded adapter), and peft's variants
(DoRA, rank-stabilised scaling, a rank per layer): a file that uses one is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import CheckpointError, ConfigError, did_you_mean, listing
from lockstep.learning import randomness
from lockstep.models.architecture import classifier_class, family_of, language_head, linear_layers, usual_name
from lockstep.models.blueprint import Adapter, Blueprint
from lockstep.models.checkpoint import ADAPTER_CONFIG, CheckpointConfig, check_files
from lockstep.processes import Processes
from lockstep.storage.files import read_object, replace, write_json
from lockstep.storage.weights import check_finite, read_tensors, read_weights, write_tensors, write_weights
from lockstep.text.tokenizer import GENERATION, TOKEN_IDS

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""The prefix that peft puts before the names of the base model."""


@dataclass(frozen=True)
class LoRAConfig(CheckpointConfig):
    """The configuration of the policy ``lora``, for every backend."""

    rank: int = setting(16, "Inner dimension of the adapter's two matrices.", least=1)
    alpha: float = setting(32.0, "The adapter is scaled by alpha / rank (Hu et al. 2021, section 4.1).", above=0)
    targets: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "Linear layers, by the last part of their names. The default is all of Llama's; for GPT-2: c_attn, c_proj, c_fc.",
    )

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("policy.targets is empty, so there is nothing to train. Name at least one linear layer.")

    def blueprint(self) -> Blueprint:
        whole = super().blueprint()
        layers = linear_layers(whole.architecture)
        return dataclasses.replace(whole, adapter=self.adapter(layers, conv1d=family_of(whole.architecture).naming.transposed))

    def adapter(self, layers: Iterable[str], *, conv1d: bool) -> Adapter:
        """The adapter for a checkpoint whose linear layers have the names ``layers``.

        Raises:
          ConfigError: a target matches none of them, or names the layer of a single block.
        """
        layers = list(layers)
        last = {layer.rpartition(".")[2] for layer in layers}
        adapter = Adapter(self.path, self.rank, float(self.alpha), tuple(sorted(self.targets)), conv1d)
        for target in adapter.targets:
            if any(part.isdigit() for part in target.split(".")):
                raise ConfigError(
                    f"policy.targets names '{target}': layers are adapted in every block or in none. Leave out the number."
                )
            if not any(dataclasses.replace(adapter, targets=(target,)).adapts(layer) for layer in layers):
                raise ConfigError(
                    f"policy.targets names '{target}', which {self.path} does not have.{did_you_mean(target, last)} "
                    f"Its linear layers: {listing(last)}."
                )
        return adapter


def initial(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Fresh weights, float32: A uniform in ±1 / sqrt(inputs), as peft draws it, and B zero, so that the adapted model starts
    equal to the base. Drawn on the host in the order of names, so all backends start alike."""
    rng = randomness.generator(seed, "initial adapter")
    out = {}
    for name in sorted(shapes):
        rows, columns = shapes[name]
        bound = 1 / math.sqrt(columns) if name.endswith("lora_A.weight") else 0.0
        out[name] = rng.uniform(-bound, bound, (rows, columns)).astype(np.float32)
    return out


# -------------------------------------------------------------------------------------------------------------- files


def write(
    folder: Path,
    adapter: Adapter,
    shapes: Mapping[str, tuple[int, ...]],
    gather: Callable[[str], np.ndarray],
    processes: Processes,
    *,
    scalar: bool,
) -> None:
    """Write an adapter folder as peft does, which reads no shards. With ``scalar`` it is for a sequence classifier, whose head is
    saved whole. Every process has to call this, as for `lockstep.storage.weights.write_weights`."""
    theirs = {PREFIX + name: shape for name, shape in shapes.items()}
    write_weights(folder, theirs, lambda name: gather(name.removeprefix(PREFIX)), processes, WEIGHTS, sharded=False)
    if not processes.leads:
        return
    settings = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM", "base_model_name_or_path": adapter.base,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": 0.0, "target_modules": list(adapter.targets),
        "fan_in_fan_out": adapter.conv1d, "bias": "none", "modules_to_save": ["score"] if scalar else None,
        "inference_mode": True,
    }  # fmt: skip
    write_json(folder / ADAPTER_CONFIG, settings)


def read(folder: Path | str) -> tuple[Adapter, dict[str, np.ndarray]]:
    """The adapter in a folder that `write` or peft wrote, and its float32 tensors.

    Raises:
      CheckpointError: the adapter is missing or damaged, or its kind is not supported.
    """
    folder = Path(folder)
    settings = read_object(folder / ADAPTER_CONFIG)
    _refuse_variants(folder, settings)
    kinds = {"base_model_name_or_path": (str,), "r": (int,), "lora_alpha": (int, float)}
    if wrong := [f"{key}={settings.get(key)!r}" for key, kind in kinds.items() if type(settings.get(key)) not in kind]:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} is damaged: it has {', '.join(wrong)}.")
    adapter = Adapter(
        base=settings["base_model_name_or_path"],
        rank=settings["r"],
        alpha=float(settings["lora_alpha"]),
        targets=tuple(sorted(settings["target_modules"])),
        conv1d=bool(settings.get("fan_in_fan_out", False)),
    )
    tensors = read_tensors(folder / WEIGHTS)
    check_finite(tensors.items(), f"The adapter in {folder}")
    found = {name.removeprefix(PREFIX): np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    ranks = {name: tensor.shape[".lora_B." in name] for name, tensor in found.items() if ".lora_" in name and tensor.ndim == 2}
    if other := sorted(name for name, rank in ranks.items() if rank != adapter.rank):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} has r={adapter.rank}, but {other[0]} is {found[other[0]].shape}.")
    return adapter, found


def base_of(folder: Path | str) -> str | None:
    """The base that the adapter in a folder names; None if there is no adapter, or its settings are damaged."""
    try:
        base = read_object(Path(folder) / ADAPTER_CONFIG).get("base_model_name_or_path")
    except (CheckpointError, OSError):
        return None  # opening the adapter reports the error
    return base if isinstance(base, str) else None


PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": (None, "none"), "modules_to_save": (None, [], ["score"]), "revision": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # other values change the base's weights too
}  # fmt: skip
"""Supported values of peft's settings. Those in `VARIANTS` must be off."""
VARIANTS = (
    "use_dora", "use_rslora", "use_qalora", "use_bdlora", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "layer_replication", "trainable_token_indices", "target_parameters", "exclude_modules", "lora_bias",
    "alora_invocation_tokens",
)  # fmt: skip


def _refuse_variants(folder: Path, settings: Mapping[str, Any]) -> None:
    wrong = [key for key, known in PLAIN.items() if settings.get(key) not in known]
    wrong += [key for key in VARIANTS if settings.get(key)]
    targets = settings.get("target_modules")
    wrong += ["target_modules"] * (not isinstance(targets, list) or not all(isinstance(target, str) for target in targets))
    if wrong:
        raise CheckpointError(
            f"The adapter in {folder} uses {wrong[0]}={settings.get(wrong[0])!r}, which is not supported: only plain LoRA on "
            "listed layers is. Merge it with peft (merge_and_unload) and use the result with policy=huggingface."
        )


def check(folder: Path | str, found: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """
    Raises:
      CheckpointError: the tensors do not have these names and shapes.
    """
    if wrong := sorted(n for n in found.keys() | shapes.keys() if n not in found or found[n].shape != shapes.get(n)):
        raise CheckpointError(f"The adapter in {folder} does not fit its base: {', '.join(wrong[:3])}.")


# -------------------------------------------------------------------------------------------------------------- merge


def merge(folder: Path, output: Path) -> Path:
    """Write the base with the adapter added to its weights, as an ordinary float32 checkpoint with the adapter's tokenizer and
    stop tokens, or else the base's.

    Raises:
      CheckpointError: ``folder`` holds no adapter, or its base is missing.
    """
    if not (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{folder} holds no adapter: {ADAPTER_CONFIG} is missing. Name the output folder of a stage with policy=lora."
        )
    adapter, tensors = read(folder)
    base, config, _ = check_files(adapter.base)
    weights = read_weights(base)
    config |= {"dtype": "float32"}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        change = adapter.scale * tensors[f"{layer}.lora_B.weight"] @ tensors[name]
        name = _stored(layer, weights, folder)
        weights[name] = weights[name] + (change.T if adapter.conv1d else change)
    if heads := {name: tensor for name, tensor in tensors.items() if name.startswith("score.")}:
        family = config["model_type"]
        weights = {n: tensor for n, tensor in weights.items() if usual_name(family, n) != language_head(family)} | heads
        config |= {"architectures": [classifier_class(config)], "num_labels": 1}
    check_finite(weights.items(), f"The adapter in {folder}, merged with {base},")
    texts, generation = (folder if (folder / name).exists() else base for name in ("tokenizer.json", GENERATION))
    if generation == folder:
        config |= {key: value for key, value in read_object(folder / GENERATION).items() if key in TOKEN_IDS}
    write_tensors(output / "model.safetensors", weights)
    write_json(output / "config.json", config)
    for file in [*texts.glob("*token*"), texts / "chat_template.jinja", generation / GENERATION]:
        if file.exists():
            replace(output / file.name, functools.partial(shutil.copyfile, file))
    return output


def _stored(layer: str, weights: Mapping[str, np.ndarray], folder: Path) -> str:
    """The name of a layer's weight in the base's files, which may lack the trunk's prefix."""
    for name in (f"{layer}.weight", f"{layer.partition('.')[2]}.weight"):
        if name in weights:
            return name
    raise CheckpointError(f"The adapter in {folder} does not fit its base: it has no {layer}.weight.")
