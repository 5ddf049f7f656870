"""The two residual networks of the paper's CIFAR-10 experiments, for 32×32 images and ten classes.

ResNet-34 is torchvision's with another stem: a 3×3 convolution of stride 1, its max-pooling kept. ResNet-9 is the one
of davidcpage/cifar10-fast. Both take images ``[B, 3, 32, 32]`` and return logits ``[B, 10]``.
"""

from collections import OrderedDict

from torch import Tensor, nn

CLASSES = 10
HEADS = {"resnet34": "fc", "resnet9": "linear"}


def resnet34() -> nn.Module:
    """Return a ResNet-34 with fresh weights, 21,282,122 parameters.

    Convolutions start from Kaiming's normal distribution (fan-out), norms from 1 and 0.

    Source:
        torchvision's ``resnet34`` (BasicBlock, [3, 4, 6, 3]) with the stem of the authors' ``cifar10-fast/resnet.py``.
    """
    model = nn.Sequential(
        OrderedDict(
            conv1=_convolution(3, 64),
            bn1=nn.BatchNorm2d(64),
            relu=nn.ReLU(),
            maxpool=nn.MaxPool2d(3, stride=2, padding=1),
            layer1=_stage(64, 64, blocks=3, stride=1),
            layer2=_stage(64, 128, blocks=4, stride=2),
            layer3=_stage(128, 256, blocks=6, stride=2),
            layer4=_stage(256, 512, blocks=3, stride=2),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(512, CLASSES),
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def resnet9(width: int = 64) -> nn.Module:
    """Return a ResNet-9 with fresh weights, 6,573,120 parameters at its own width.

    Args:
        width: Channels of the first layer; the last has eight times as many.

    Raises:
        ValueError: The width is below 1.

    Source:
        davidcpage/cifar10-fast, ``dawn.py`` (``net``): logits are an eighth of the linear layer's output.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    return nn.Sequential(
        OrderedDict(
            prep=_layer(3, width),
            layer1=nn.Sequential(*_layer(width, 2 * width), nn.MaxPool2d(2), Residual(2 * width)),
            layer2=nn.Sequential(*_layer(2 * width, 4 * width), nn.MaxPool2d(2)),
            layer3=nn.Sequential(*_layer(4 * width, 8 * width), nn.MaxPool2d(2), Residual(8 * width)),
            pool=nn.MaxPool2d(4),
            flatten=nn.Flatten(),
            linear=nn.Linear(8 * width, CLASSES, bias=False),
            scale=Scale(0.125),
        )
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside the identity, or beside a 1×1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(channels_in, channels_out, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _convolution(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            convolution = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in, H, W]`` to ``[B, out, H/stride, W/stride]``."""
        out = self.relu(self.bn1(self.conv1(x)))
        result: Tensor = self.relu(self.bn2(self.conv2(out)) + self.downsample(x))
        return result


class Residual(nn.Module):
    """Two layers beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_layer(channels, channels), _layer(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        result: Tensor = x + self.layers(x)
        return result


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return ``factor × x``."""
        return self.factor * x


def _convolution(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


def _layer(channels_in: int, channels_out: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(_convolution(channels_in, channels_out), nn.BatchNorm2d(channels_out), nn.ReLU())


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    """Blocks of which the first changes the shape."""
    first = BasicBlock(channels_in, channels_out, stride)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)))
