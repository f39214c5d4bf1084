"""The schemes that come with the package, a file each. Importing one makes it known by its name."""

from quantizers.schemes.binary import Binary, binarize
from quantizers.schemes.dorefa import DoReFa
from quantizers.schemes.kmeans import KMeans
from quantizers.schemes.linear import Linear
from quantizers.schemes.lsq import LSQ, LSQPlus
from quantizers.schemes.pact import PACT, pact_penalty

__all__ = ["LSQ", "PACT", "Binary", "DoReFa", "KMeans", "LSQPlus", "Linear", "binarize", "pact_penalty"]
