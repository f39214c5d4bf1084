"""Quantizers for anyone's training script.

import quantizers as Q
qnet = Q.quantize(net, Q.BitPolicy.uniform(net, w=4, a=4), calibrate=loader)
Q.set_policy(qnet, policy)
"""

from quantizers.backward import BACKWARD
from quantizers.binary import (
    Binary,
    Bop,
    RPReLU,
    RSign,
    Stage,
    WeightClipping,
    binarize,
    clip_weights,
    split_parameters,
    two_stages,
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
from quantizers.ensemble import Ensemble, bagging, boosting
from quantizers.folding import fold_batch_norm
from quantizers.functional import dequantize, fake_quantize, integer_range
from quantizers.functional import quantize as quantize_tensor
from quantizers.kmeans import KMeans
from quantizers.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    activation_scales,
    backward_mode,
    float_copy,
    get_policy,
    load_quantizer_state,
    quant_layers,
    quantize,
    quantizer_state,
    set_policy,
)
from quantizers.learned import LSQ, PACT, DoReFa, LSQPlus, learned_parameters, pact_penalty
from quantizers.linear import Linear
from quantizers.policy import BitPolicy
from quantizers.pruning import MainSubsidiary, kept_share, layerwise_pruning, masked_layers, remove_filters
from quantizers.scheme import Scheme

__all__ = [
    "BACKWARD",
    "LSQ",
    "PACT",
    "Binary",
    "BitPolicy",
    "Bop",
    "ConvexAdd",
    "DoReFa",
    "Ensemble",
    "KMeans",
    "LSQPlus",
    "Linear",
    "MainSubsidiary",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "RPReLU",
    "RSign",
    "Scheme",
    "Stage",
    "WeightClipping",
    "Wiring",
    "activation_scales",
    "backward_mode",
    "bagging",
    "binarize",
    "boosting",
    "clip_weights",
    "dequantize",
    "draw_amplification",
    "error_amplification",
    "fake_quantize",
    "float_copy",
    "fold_batch_norm",
    "get_policy",
    "integer_range",
    "kept_share",
    "layerwise_pruning",
    "learned_parameters",
    "lipschitz_bound",
    "lipschitz_penalty",
    "masked_layers",
    "load_quantizer_state",
    "operator_norm",
    "pact_penalty",
    "quant_layers",
    "quantize",
    "quantize_tensor",
    "quantizer_state",
    "remove_filters",
    "set_policy",
    "spectral_norms",
    "split_parameters",
    "two_stages",
]
