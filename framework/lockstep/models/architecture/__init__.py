"""What a decoder is, independent of any array library: sizes and switches, initial weights, names of tensors.

Backends build the network; this package says which one. Parameters travel as ``{name: float32 array}`` in the names and
layouts of the family's Hugging Face checkpoint, so a checkpoint from either backend opens in the other and in transformers.

    shape.py       `Architecture`: sizes and switches
    naming.py      a family's tensor names and layouts to the common ones, and back
    keys.py        ``config.json`` keys that several families share
    family.py      `Family`: everything about a family, in one record
    families/      one file per family, with its record
    tensors.py     a decoder's tensors, their shapes and initial values
    __main__.py    the table of families in docs/models.md: python -m lockstep.models.architecture
"""

from lockstep.models.architecture.families import (
    FAMILIES,
    WrongValue,
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
    BUFFERS,
    SCALAR_BIAS,
    SCALAR_HEAD,
    check_labels,
    check_shapes,
    head_shapes,
    initial_parameters,
    linear_layers,
    parameter_shapes,
    refuse_tensors,
    scalar_head,
    scalar_shapes,
    trunk_shapes,
    usual_names,
    usual_tensors,
)

__all__ = [
    "Architecture",
    "BUFFERS",
    "FAMILIES",
    "Family",
    "Naming",
    "QKV",
    "Rope",
    "RopeScaling",
    "SCALAR_BIAS",
    "SCALAR_HEAD",
    "SmallDecoderConfig",
    "WrongValue",
    "causal_class",
    "check_labels",
    "check_shapes",
    "classifier_class",
    "family_of",
    "from_hf",
    "head_shapes",
    "initial_parameters",
    "is_small_decoder",
    "linear_layers",
    "parameter_shapes",
    "refuse_tensors",
    "register",
    "scalar_head",
    "scalar_shapes",
    "small_decoder",
    "to_hf",
    "trunk_shapes",
    "language_head",
    "usual_name",
    "usual_names",
    "usual_tensors",
]
