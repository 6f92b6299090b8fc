"""Other networks in integers: every kind of operation, and five of torchvision's, untrained, so
that the measure is codes.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import equal_codes
from examples import torchvision_network
from torch import nn

import quantlab as ql
from quantlab.integer import proof
from quantlab.integer.network import to_integer


class Tangle(nn.Module):
    """Functional and module forms, reused ReLUs, concat of what is stored and what is not, chunk,
    shuffles, BatchNorm that cannot be folded.
    """

    def __init__(self):
        super().__init__()
        first = nn.Conv2d(3, 8, 3, padding="same", bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.pre = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.a = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.c = nn.Conv2d(16, 16, (1, 3), stride=(1, 2))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.relu(self.a(self.relu(self.pre(x))))
        y += x
        z = F.relu(self.b(F.max_pool2d(y, 3, 2, 1)))
        z = torch.cat([z, F.avg_pool2d(y, 3, 2, 1)], 1)
        first, second = z.chunk(2, 1)
        z = F.channel_shuffle(torch.cat([second, first + first], dim=1), 4)
        z = F.hardtanh(F.max_pool2d(self.c(z), 2, ceil_mode=True), -0.5, 0.75)
        return self.fc(F.adaptive_max_pool2d(z, 1).view(x.size(0), -1))


@pytest.mark.parametrize("config", [
    ql.QuantConfig(8, 8, weight_observer="minmax"), ql.QuantConfig(3, 4, residual_bits=5)], ids=str)
def test_a_network_of_everything(config):
    x = torch.randn(4, 3, 15, 15)
    model = Tangle().train()
    with torch.no_grad():
        model(x)  # BatchNorm statistics
    qmodel = ql.quantize(model.eval(), ql.collect(model, [x]), config)
    frame = proof.per_operation(qmodel, to_integer(qmodel), [x[:2]])
    narrowed = {"requantize"} if config.act_bits == 4 else set()
    assert set(frame.kind) == {"conv", "affine", "add", "cat", "maxpool"} | narrowed
    assert frame.max_difference.max() <= 1 and frame.share.max() < 2e-3
    for rounding in ("single", "double"):
        reference = to_integer(qmodel, rounding).codes(x[:2])
        for compile in (False, None):
            imodel = to_integer(qmodel, rounding, "fast", compile=compile)
            assert equal_codes(imodel.codes(x[:2]), reference)
    loss = (to_integer(qmodel)(x[:2]) - qmodel(x[:2])).abs().max() / qmodel(x[:2]).abs().max()
    assert loss < 0.1


class Dense(nn.Module):
    """A small network of one answer a place, and what its author does with that."""

    def __init__(self, end):
        super().__init__()
        self.a, self.b, self.end = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, 2, 1), end

    def forward(self, x):
        y = self.a(x).relu()
        return self.end(self.b(y), x, y)


@pytest.mark.parametrize("executor", ["reference", "fast"])
@pytest.mark.parametrize("end", [
    lambda z, x, y: z.view(x.size(0), -1), lambda z, x, y: z.reshape(x.shape[0], 2, -1),
    lambda z, x, y: F.interpolate(z, size=x.shape[2:], mode="bilinear"),
    lambda z, x, y: F.interpolate(z, size=(x.shape[-2] // 3, x.size(3) + 1)).softmax(1),
    lambda z, x, y: z.view(z.shape[0], 2, 2, z.shape[2], z.shape[3]).permute(0, 1, 3, 4, 2),
    lambda z, x, y: (lambda v: v.view(v.shape[0], v.shape[1] // 2, 2))(z.flatten(1) * 2),
    lambda z, x, y: z.to(x.dtype)])
def test_the_end_of_a_network_may_read_sizes_of_image_and_logits(end, executor):
    def convert(end):
        torch.manual_seed(0)
        model, x = Dense(end).eval(), torch.randn(4, 3, 12, 12)
        return ql.to_integer(ql.quantize(model, ql.collect(model, [x])), executor=executor)

    imodel, plain = convert(end), convert(lambda z, x, y: z)
    for shape in ((4, 3, 12, 12), (3, 3, 16, 12)):  # another than it was calibrated on too
        x = torch.randn(shape)
        assert torch.equal(imodel(x), end(plain(x), x, None))


def test_a_size_of_a_value_between_them_is_refused_with_its_node():
    model = Dense(lambda z, x, y: F.interpolate(z, size=y.shape[2:])).eval()
    x = torch.randn(4, 3, 8, 8)
    qmodel = ql.quantize(model, ql.collect(model, [x]))
    with pytest.raises(ql.UserError, match="reads the size of quantizers_relu at the end of the"):
        ql.to_integer(qmodel)


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11_bn", "mobilenet_v2", "densenet121", "googlenet"])
def test_torchvision_networks(name):
    """Each operation fed the same codes, two images of 64 x 64."""
    x = torch.randn(4, 3, 64, 64)
    model = torchvision_network(name, x)
    if name == "vgg11_bn":  # a narrower classifier: its own has 120 million weights
        narrow = nn.Linear(25088, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        model.classifier[0], model.classifier[3], model.classifier[6] = narrow
    config = ql.QuantConfig(8, 8, weight_observer="minmax")
    qmodel = ql.quantize(model, ql.collect(model, [x]), config)
    imodel = to_integer(qmodel, executor="fast")
    frame = proof.per_operation(qmodel, imodel, [x[:2]])
    assert frame.max_difference.max() <= 1, frame.nlargest(3, "share").to_string()
    # the average of four codes on their own grid is a tie every fourth time
    unexplained = (frame.differing - frame.ties) / frame["values"]
    farthest = frame.nlargest(3, "from_tie").to_string()
    assert unexplained.max() < 1e-3 and frame.from_tie.max() < 1e-4, farthest
    assert set(frame.edge) | {"x"} == {edge for edge, _ in qmodel.quantizers.named_children()}
    assert equal_codes(imodel.codes(x[:1]), to_integer(qmodel).codes(x[:1]))
    assert imodel.report((3, 64, 64)).accumulator_bits.max() <= 32


class ClampBeside(nn.Module):
    """A clamp of a value that someone else reads as well: nothing is stored anew behind it."""

    def __init__(self, clamp, image=False):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.fc, self.clamp, self.image = nn.Linear(3, 5), clamp, image

    def forward(self, x):
        y = x if self.image else self.a(x)
        return self.fc(F.relu(y + self.b(self.clamp(y))).mean((2, 3)))


@pytest.mark.parametrize("clamp", [nn.ReLU6(), nn.Hardtanh(-0.7, 1.3), nn.ReLU()], ids=str)
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("changes", [
    {}, {"act_symmetric": True}, {"residual_bits": 4}, {"act_bits": 4, "weight_bits": 4}], ids=str)
def test_bounds_of_a_clamp_are_codes(clamp, image, changes):
    """In the simulation as in integers: what a layer reads lies on its grid, and is the same."""
    torch.manual_seed(0)
    model, x = ClampBeside(clamp, image).eval(), 8 * torch.randn(4, 3, 12, 12)
    qmodel = ql.quantize(model, ql.collect(model, [x]), ql.QuantConfig(**changes)).double()
    read = []
    qmodel.layers["b"].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    qmodel(x.double())
    q = qmodel.reads("b")
    off = read[0] / q.scale.double() - torch.round(read[0] / q.scale.double())
    assert off.abs().max() < 1e-4  # a code in float32, times a scale in float32
    frame = proof.per_operation(qmodel, to_integer(qmodel), [x.double()])
    assert frame.max_difference.max() <= 1 and (frame.differing == frame.ties).all()


def test_a_mean_over_the_images_of_a_batch_is_refused():
    class Mean(ClampBeside):
        def forward(self, x):
            return self.fc(F.relu(self.a(x)).mean(self.dims, keepdim=True).flatten(1))

    model, x = Mean(F.relu).eval(), torch.randn(4, 3, 8, 8)
    for model.dims in ((0, 2, 3), (-4, -2, -1)):
        qmodel = ql.quantize(model, ql.collect(model, [x]))
        for executor in ("reference", "fast"):
            with pytest.raises(ql.UserError, match="mean.* averages over the images of a batch"):
                to_integer(qmodel, executor=executor)(x)


def test_a_network_without_an_edge_but_its_input_has_nothing_to_compare():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(2, 3, 8, 8)
    qmodel = ql.quantize(model, ql.collect(model, [x]))
    imodel = to_integer(qmodel)
    with pytest.raises(ql.UserError, match="stores no codes but its input's.*compare imodel"):
        proof.per_operation(qmodel, imodel, [x])
    assert proof.end_to_end(qmodel, imodel, [x]).edge.tolist() == ["input_1"]
    for compare in (proof.per_operation, proof.end_to_end):
        with pytest.raises(ql.UserError, match="no images to compare on"):
            compare(qmodel, imodel, [])
