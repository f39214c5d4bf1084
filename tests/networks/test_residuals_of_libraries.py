"""Networks of the libraries get a quantizer at every tensor that is added or averaged, and compute the same."""

from __future__ import annotations

import pytest
import torch

import quantizers as Q
from haq.networks.building import build, names_of

# With the number of these tensors.
NETWORKS = {
    "timm:resnet18": 17,
    "timm:mobilenetv3_small_050": 24,
    "timm:regnety_002": 40,
    "timm:ghostnet_050": 40,
    "torchvision:mobilenet_v2": 21,
    "torchvision:shufflenet_v2_x0_5": 1,
    "torchvision:densenet121": 4,
    "torchvision:efficientnet_b0": 35,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_libraries_are_followed(name: str) -> None:
    if name not in names_of(name.partition(":")[0]):
        pytest.skip("the library isn't installed")
    made = build(name, 10, False).module.eval()
    x = torch.randn(2, 3, 64, 64)
    inserted = Q.insert_residual_quantizers(made, x)
    assert len(Q.residual_quantizers(inserted)) == NETWORKS[name]
    assert torch.equal(inserted(x), made(x))


@pytest.mark.slow
def test_what_is_called_with_a_list_is_refused_by_its_name() -> None:
    name = "timm:hrnet_w18_small"
    if name not in names_of("timm"):
        pytest.skip("the library isn't installed")
    made = build(name, 10, False).module.eval()
    with pytest.raises(ValueError, match=r"HighResolutionNet can't have residual quantizers, .* module 'stage2.0'"):
        Q.insert_residual_quantizers(made, torch.randn(2, 3, 64, 64))
