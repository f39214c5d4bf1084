"""Criteria that say which channels to keep, a file each."""

from quantizers.pruning.criteria.batch_norm import BatchNormScale
from quantizers.pruning.criteria.ccp import CollaborativeChannels
from quantizers.pruning.criteria.geometric_median import GeometricMedian
from quantizers.pruning.criteria.kse import KernelSparsityEntropy
from quantizers.pruning.criteria.norm import L1, L2
from quantizers.pruning.criteria.random import Random
from quantizers.pruning.criteria.taylor import Taylor

__all__ = [
    "L1",
    "L2",
    "BatchNormScale",
    "CollaborativeChannels",
    "GeometricMedian",
    "KernelSparsityEntropy",
    "Random",
    "Taylor",
]
