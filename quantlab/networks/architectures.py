"""The two networks of the workbook, untrained, by name."""

import torch
import torch.nn.functional as F
from torch import nn

from quantlab.system.errors import check_name


class BasicBlock(nn.Module):
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), with 3x3 convolutions."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity()
        if stride != 1 or c_in != c_out:
            projection = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """He et al. 2016 (arXiv:1512.03385, section 4.2), for 32x32 images: 16-32-64 channels, three
    blocks each; 0.27 M parameters.

    The two shortcuts that change shape are 1x1 convolutions (option B), so that the graph has only
    convolutions, adds and ReLUs.
    """

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _three_blocks(16, 16, 1)
        self.layer2 = _three_blocks(16, 32, 2)
        self.layer3 = _three_blocks(32, 64, 2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.fc(x)


def _three_blocks(c_in, c_out, stride):
    first = BasicBlock(c_in, c_out, stride)
    return nn.Sequential(first, BasicBlock(c_out, c_out, 1), BasicBlock(c_out, c_out, 1))


def resnet50(num_classes=10):
    """torchvision's ResNet-50 with a 3x3 stride-1 stem and no max-pool, for 32x32 images.

    23,520,842 parameters with ten outputs.
    """
    import torchvision

    model = torchvision.models.resnet50(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


ARCHITECTURES = {"resnet20": ResNet20, "resnet50": resnet50}


def build(name, num_classes=10):
    """An untrained network by name, or UserError with the names there are."""
    check_name("model", name, ARCHITECTURES)
    return ARCHITECTURES[name](num_classes)


def zero_last_gamma(model):
    """Set the scale of every residual block's last BatchNorm to 0, so that each block starts as the
    identity (Goyal et al. 2017).
    """
    for module in model.modules():
        last = getattr(module, "bn3", getattr(module, "bn2", None))
        if last is not None:
            nn.init.zeros_(last.weight)
