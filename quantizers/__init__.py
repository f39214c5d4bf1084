"""Quantizers for anyone's training script.

import quantizers as Q
qnet = Q.quantize(net, Q.BitPolicy.uniform(net, w=4, a=4), calibrate=loader)
Q.set_policy(qnet, policy)
"""

from quantizers.backward import (
    BACKWARD,
)
from quantizers.binary_training import (
    Bop,
    RPReLU,
    RSign,
    Stage,
    WeightClipping,
    clip_weights,
    split_parameters,
    two_stages,
)
from quantizers.copying import (
    copy_network,
)
from quantizers.correction import (
    Correction,
    correct_bias,
)
from quantizers.defensive import (
    ConvexAdd,
    Wiring,
    draw_amplification,
    error_amplification,
    lipschitz_bound,
    lipschitz_penalty,
    operator_norm,
    spectral_norms,
)
from quantizers.ensemble import (
    Ensemble,
    bagging,
    boosting,
)
from quantizers.equalization import (
    ChannelClamp,
    equalize,
    smooth,
)
from quantizers.folding import (
    fold_batch_norm,
    fold_shifts,
)
from quantizers.functional import (
    MAX_BITS,
    WIDTHS,
    dequantize,
    fake_quantize,
    integer_range,
    quantize_tensor,
    row_of,
)
from quantizers.kept import (
    kept_channels,
)
from quantizers.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
)
from quantizers.left_in_float import (
    LeftInFloat,
)
from quantizers.network import (
    activation_scales,
    backward_mode,
    float_copy,
    get_policy,
    learned_parameters,
    load_quantizer_state,
    quant_layers,
    quantize,
    quantizer_state,
    scheme_records,
    set_policy,
)
from quantizers.norms import (
    reestimate_norms,
)
from quantizers.plugins import PluginRow
from quantizers.policy import (
    END_BITS,
    BitPolicy,
    ends,
)
from quantizers.pruning import (
    ChannelGroup,
    ChannelGroups,
    Criterion,
    MainSubsidiary,
    Ranking,
    apply_kept,
    channel_groups,
    criterion_names,
    criterion_rows,
    kept_share,
    layerwise_pruning,
    mask_channels,
    masked_layers,
    prune,
    remove_channels,
    remove_filters,
    share_kernels,
)
from quantizers.reconstruction import (
    ReconstructedPart,
    Reconstruction,
    reconstruct,
)
from quantizers.residuals import (
    ResidualGrid,
    ResidualQuantizer,
    add_residual_quantizers,
    insert_residual_quantizers,
    remove_residual_quantizers,
    residual_places,
    residual_quantizers,
)
from quantizers.scheme import (
    IntegerActivations,
    IntegerWeights,
    Scheme,
    SchemeLayer,
    scheme_names,
    scheme_rows,
    schemes_from_records,
)
from quantizers.schemes import (
    LSQ,
    PACT,
    Binary,
    DoReFa,
    KMeans,
    Linear,
    LSQPlus,
    binarize,
    pact_penalty,
)

__all__ = [
    "BACKWARD",
    "Binary",
    "BitPolicy",
    "Bop",
    "ChannelClamp",
    "ChannelGroup",
    "ChannelGroups",
    "ConvexAdd",
    "Correction",
    "Criterion",
    "DoReFa",
    "END_BITS",
    "Ensemble",
    "IntegerActivations",
    "IntegerWeights",
    "KMeans",
    "LSQ",
    "LSQPlus",
    "LeftInFloat",
    "Linear",
    "MAX_BITS",
    "MainSubsidiary",
    "PACT",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "RPReLU",
    "RSign",
    "PluginRow",
    "Ranking",
    "ReconstructedPart",
    "Reconstruction",
    "ResidualGrid",
    "ResidualQuantizer",
    "Scheme",
    "SchemeLayer",
    "Stage",
    "WIDTHS",
    "WeightClipping",
    "Wiring",
    "activation_scales",
    "add_residual_quantizers",
    "apply_kept",
    "backward_mode",
    "bagging",
    "binarize",
    "boosting",
    "channel_groups",
    "clip_weights",
    "copy_network",
    "correct_bias",
    "criterion_names",
    "criterion_rows",
    "dequantize",
    "draw_amplification",
    "ends",
    "equalize",
    "error_amplification",
    "fake_quantize",
    "float_copy",
    "fold_batch_norm",
    "fold_shifts",
    "get_policy",
    "insert_residual_quantizers",
    "integer_range",
    "kept_channels",
    "kept_share",
    "layerwise_pruning",
    "learned_parameters",
    "lipschitz_bound",
    "lipschitz_penalty",
    "load_quantizer_state",
    "mask_channels",
    "masked_layers",
    "operator_norm",
    "pact_penalty",
    "prune",
    "quant_layers",
    "quantize",
    "quantize_tensor",
    "quantizer_state",
    "reconstruct",
    "reestimate_norms",
    "remove_channels",
    "remove_filters",
    "remove_residual_quantizers",
    "residual_places",
    "residual_quantizers",
    "row_of",
    "scheme_names",
    "scheme_records",
    "scheme_rows",
    "schemes_from_records",
    "set_policy",
    "share_kernels",
    "smooth",
    "spectral_norms",
    "split_parameters",
    "two_stages",
]
