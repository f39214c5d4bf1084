"""Quantizers for anyone's training script.

import quantizers as Q
qnet = Q.quantize(net, Q.BitPolicy.uniform(net, w=4, a=4), calibrate=loader)
Q.set_policy(qnet, policy)
"""

from quantizers.folding import fold_batch_norm
from quantizers.functional import dequantize, fake_quantize, integer_range
from quantizers.functional import quantize as quantize_tensor
from quantizers.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    activation_scales,
    float_copy,
    get_policy,
    load_quantizer_state,
    quant_layers,
    quantize,
    quantizer_state,
    set_policy,
)
from quantizers.linear import Linear
from quantizers.policy import BitPolicy
from quantizers.scheme import Scheme

__all__ = [
    "BitPolicy",
    "Linear",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "Scheme",
    "activation_scales",
    "dequantize",
    "fake_quantize",
    "float_copy",
    "fold_batch_norm",
    "get_policy",
    "integer_range",
    "load_quantizer_state",
    "quant_layers",
    "quantize",
    "quantize_tensor",
    "quantizer_state",
    "set_policy",
]
