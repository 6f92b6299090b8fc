"""Networks that several tests quantize."""

import torch
import torch.nn.functional as F
from torch import nn

TORCHVISION = (
    "resnet18", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "googlenet",
    "shufflenet_v2_x0_5", "squeezenet1_1", "efficientnet_b0",
)


def randomize_batchnorm(model):
    """BatchNorm statistics as a trained network has them, so that folding has something to do."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.3, 3)
            nn.init.uniform_(module.weight, 0.3, 2)
            nn.init.normal_(module.bias)
    return model.eval()


def torchvision_network(name, x, classes=10):
    """A torchvision network with random weights and BatchNorm statistics of x, in eval mode."""
    import torchvision

    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(num_classes=classes, **options)
    with torch.no_grad():
        model.train()(x)
    return model.eval()


class Tangle(nn.Module):
    """What people write: functional and module forms, reused and in-place ReLUs, concat, chunk, a
    BatchNorm that cannot be folded."""

    def __init__(self):
        super().__init__()
        first = nn.Conv2d(3, 8, 3, padding=1)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.pre = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.a = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.b = nn.Conv2d(8, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.relu(self.pre(x))
        y = self.relu(self.bn(self.a(y)))
        y += x
        z = F.relu(self.b(F.max_pool2d(y, 2)))
        z = torch.cat([z, F.hardswish(F.avg_pool2d(y, 2))], 1)
        first, second = z.chunk(2, 1)
        z = torch.cat([second, first], dim=1)
        return self.fc(self.drop(z.mean((2, 3))).view(x.size(0), -1))
