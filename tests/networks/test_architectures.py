"""Networks: the counts of the papers, and names that are unknown."""

import pytest
import torch

import quantlab as ql
from quantlab.networks import architectures


@pytest.mark.parametrize("name, parameters, convolutions", [
    ("resnet20", 272_474, 21), ("resnet50", 23_520_842, 53),
])
def test_architectures(name, parameters, convolutions):
    model = ql.load_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == convolutions
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_unknown_architecture_is_refused_with_a_suggestion():
    with pytest.raises(ql.UserError, match="did you mean resnet20.*use one of: resnet20, resnet50"):
        ql.load_model("resnet2O")


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_every_residual_block_starts_as_the_identity(name):
    network = architectures.build(name).eval()
    architectures.zero_last_gamma(network)
    block = network.layer2[1]
    x = torch.rand(2, block.conv1.in_channels, 4, 4)
    assert torch.equal(block(x), x)
