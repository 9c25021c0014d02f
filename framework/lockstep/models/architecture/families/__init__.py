"""The supported families, one file each. Every file in this folder is registered; other code adds its own with `register`.

A file defines one `Family` under the name FAMILY. A key of ``config.json`` that changes the computation is either understood
or refused by name; keys about training, dropout and token ids are ignored.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from lockstep.errors import CheckpointError, RegistryError, listing, told
from lockstep.models.architecture.family import Family
from lockstep.models.architecture.naming import LANGUAGE_HEAD
from lockstep.models.architecture.shape import Architecture, check_values


class WrongValue(CheckpointError):
    """A value in a ``config.json`` that is wrong for every model and every library."""


FAMILIES: dict[str, Family] = {}
"""{``model_type``: family}."""


def register(family: Family) -> None:
    """Make a family known to `from_hf` and to the backends.

    Raises:
      RegistryError: another record has this ``model_type``.
    """
    if FAMILIES.setdefault(family.model_type, family) != family:
        raise RegistryError(f"A family '{family.model_type}' already exists. Registered: {listing(FAMILIES)}.")


for _module in pkgutil.iter_modules(__path__):
    register(importlib.import_module(f"{__name__}.{_module.name}").FAMILY)


def family_of(architecture: Architecture) -> Family:
    return FAMILIES[architecture.family]


def from_hf(config: Mapping[str, Any]) -> Architecture:
    """The architecture a ``config.json`` describes.

    Raises:
      CheckpointError: a model type or a switch is not supported; the message lists what is. Or the weights are quantised.
      WrongValue: a value is wrong for every model.
    """
    name = config.get("model_type")
    if inner := next((f for f in FAMILIES.values() if name is not None and f.text_model_of == name), None):
        name = inner.model_type
        config = {**_mapping(config, "text_config"), "model_type": name}
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"No decoder for model_type '{name}'. Supported: {listing(FAMILIES)}. "
            "backend=torch opens every causal language model of transformers with policy=huggingface."
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"This {name} checkpoint holds quantised weights (quantization_config), which are not supported. Use the original "
            "model, or a GGUF file of it."
        )
    try:
        architecture = FAMILIES[name].read({**FAMILIES[name].defaults, **config})
        check_values(architecture)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise WrongValue(f"The config.json of this {name} model holds a value of the wrong kind: {error}.") from error
    return architecture


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key, {})
    if not isinstance(found, Mapping):
        raise CheckpointError(f"config.json should hold an object under {key}, not {told(found)}.")
    return found


def to_hf(architecture: Architecture) -> dict[str, Any]:
    """The ``config.json`` of this architecture, without token ids."""
    family = family_of(architecture)
    named = {"model_type": architecture.family, "architectures": [family.causal]}
    return {**named, **family.write(architecture), "tie_word_embeddings": architecture.tied, "dtype": "float32"}


CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"


def causal_class(config: Mapping[str, Any]) -> str:
    """transformers' class of the causal language model with this ``config.json``: its family's or, for a family without a
    record, the class that the file names."""
    if family := FAMILIES.get(config["model_type"]):
        return family.causal
    name = config["architectures"][0]
    return name.removesuffix(CLASSIFIER) + CAUSAL if name.endswith(CLASSIFIER) else name


def classifier_class(config: Mapping[str, Any]) -> str:
    """transformers' class of the sequence classifier on the trunk of the model with this ``config.json``. For a family without
    a record, the class that the file names, with another ending."""
    if family := FAMILIES.get(config["model_type"]):
        return family.classifier
    name = config["architectures"][0]
    return name.removesuffix(CLASSIFIER).removesuffix(CAUSAL).removesuffix("LMHeadModel") + CLASSIFIER


def usual_name(model_type: str, name: str) -> str:
    """`Family.usual_name`; for a family without a record, the name unchanged."""
    return FAMILIES[model_type].usual_name(name) if model_type in FAMILIES else name


def language_head(model_type: str) -> str:
    """A checkpoint's name for the weight of its language head. A family without a record is assumed to use ours."""
    return FAMILIES[model_type].naming.rename(LANGUAGE_HEAD) if model_type in FAMILIES else LANGUAGE_HEAD
