"""What a decoder is, apart from any array library: sizes and switches, initial weights, names of tensors.

Backends build the network; this package says which one. Parameters travel as ``{name: float32 array}`` under the names and
in the layouts of the Hugging Face checkpoint of the family, so that a checkpoint of either backend opens in the other
and in transformers.

    shape.py       `Architecture`: sizes and switches
    naming.py      a family's names and layouts of tensors and those of all families, both ways
    keys.py        what the ``config.json`` of several families have in common
    family.py      `Family`: all that there is to know of a family, in one record
    families/      one file for each family, with its record
    tensors.py     which tensors there are, their shapes and first values
    __main__.py    the table of families in docs/models.md: python -m lockstep.models.architecture
"""

from lockstep.models.architecture.families import (
    FAMILIES,
    causal_class,
    classifier_class,
    family_of,
    from_hf,
    language_head,
    register,
    to_hf,
    usual_name,
)
from lockstep.models.architecture.family import Family
from lockstep.models.architecture.naming import QKV, Naming
from lockstep.models.architecture.shape import (
    Architecture,
    Rope,
    RopeScaling,
    SmallDecoderConfig,
    is_small_decoder,
    small_decoder,
)
from lockstep.models.architecture.tensors import (
    SCALAR_BIAS,
    SCALAR_HEAD,
    check_labels,
    check_parameters,
    head_shapes,
    initial_parameters,
    linear_layers,
    parameter_shapes,
    scalar_head,
    trunk_shapes,
    usual_tensors,
)

__all__ = [
    "Architecture",
    "FAMILIES",
    "Family",
    "Naming",
    "QKV",
    "Rope",
    "RopeScaling",
    "SCALAR_BIAS",
    "SCALAR_HEAD",
    "SmallDecoderConfig",
    "causal_class",
    "check_labels",
    "check_parameters",
    "classifier_class",
    "family_of",
    "from_hf",
    "head_shapes",
    "initial_parameters",
    "is_small_decoder",
    "linear_layers",
    "parameter_shapes",
    "register",
    "scalar_head",
    "small_decoder",
    "to_hf",
    "trunk_shapes",
    "language_head",
    "usual_name",
    "usual_tensors",
]
