"""What a decoder is, apart from any array library: sizes and switches, initial weights, names of tensors.

Backends build the network; this package says which one. Parameters travel as ``{name: float32 array}`` under the names and
in the layouts of the Hugging Face checkpoint of the family, so that a checkpoint of either backend opens in the other
and in transformers.

    shape.py       `Architecture`: sizes and switches
    families.py    Hugging Face's ``config.json`` of each family, both ways
    tensors.py     which tensors there are, their shapes and first values
    naming.py      a family's names and layouts of tensors and those of all families, both ways
"""

from lockstep.models.architecture.families import FAMILIES, Family, from_hf, to_hf
from lockstep.models.architecture.naming import layer_name, to_checkpoint, to_common
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
)

__all__ = [
    "FAMILIES",
    "SCALAR_BIAS",
    "SCALAR_HEAD",
    "Architecture",
    "Family",
    "Rope",
    "RopeScaling",
    "SmallDecoderConfig",
    "check_labels",
    "check_parameters",
    "from_hf",
    "head_shapes",
    "initial_parameters",
    "is_small_decoder",
    "layer_name",
    "linear_layers",
    "parameter_shapes",
    "scalar_head",
    "small_decoder",
    "to_checkpoint",
    "to_common",
    "to_hf",
    "trunk_shapes",
]
