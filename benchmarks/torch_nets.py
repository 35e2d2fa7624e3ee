"""The nets of `nets.py` in PyTorch, written by hand: no torchvision is needed.

`BUILDERS[name](*sizes)` returns the module and an example input.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(into: int, out: int, kernel: int, stride: int = 1, groups: int = 1):
    """Convolution without bias, and BatchNorm."""
    padding = kernel // 2
    conv = nn.Conv2d(into, out, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class Bottleneck(nn.Module):
    """Residual block of ResNet-50."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(into, width // 4, 1),
            nn.ReLU(),
            conv_bn(width // 4, width // 4, 3, stride),
            nn.ReLU(),
            conv_bn(width // 4, width, 1),
        )
        same = into == width and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(into, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ImageNet(nn.Module):
    """Features [batch, channels, height, width], their mean, a linear head."""

    def __init__(self, features: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def resnet(sizes: Sequence[int], widths: Sequence[int], big: bool, classes: int):
    """ResNet with bottlenecks."""
    into = widths[0] // 4
    layers = [conv_bn(3, into, 7 if big else 3, 2 if big else 1), nn.ReLU()]
    if big:
        layers.append(nn.MaxPool2d(3, 2, 1))
    for stage, (size, width) in enumerate(zip(sizes, widths, strict=True)):
        for index in range(size):
            layers.append(Bottleneck(into, width, 2 if stage and index == 0 else 1))
            into = width
    return ImageNet(nn.Sequential(*layers), into, classes)


class DenseLayer(nn.Module):
    """Reads all features and appends its own."""

    def __init__(self, into: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(into),
            nn.ReLU(),
            nn.Conv2d(into, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet(sizes: Sequence[int], growth: int, into: int, big: bool, classes: int):
    """DenseNet-BC."""
    layers: list[nn.Module]
    if big:
        layers = [conv_bn(3, into, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    else:
        layers = [nn.Conv2d(3, into, 3, padding=1, bias=False)]
    for stage, size in enumerate(sizes):
        if stage:
            half = nn.Conv2d(into, into // 2, 1, bias=False)
            layers += [nn.BatchNorm2d(into), nn.ReLU(), half, nn.AvgPool2d(2)]
            into //= 2
        for _ in range(size):
            layers.append(DenseLayer(into, growth))
            into += growth
    layers += [nn.BatchNorm2d(into), nn.ReLU()]
    return ImageNet(nn.Sequential(*layers), into, classes)


class Inverted(nn.Module):
    """Inverted residual of MobileNetV2."""

    def __init__(self, into: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = into * expansion
        expand = [conv_bn(into, inner, 1), nn.ReLU6()] if expansion != 1 else []
        self.body = nn.Sequential(
            *expand,
            conv_bn(inner, inner, 3, stride, groups=inner),
            nn.ReLU6(),
            conv_bn(inner, out, 1),
        )
        self.residual = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet_v2():
    """MobileNetV2 for 1000 classes."""
    layers, into = [conv_bn(3, 32, 3, 2), nn.ReLU6()], 32
    stages = zip(
        (1, 6, 6, 6, 6, 6, 6),
        (16, 24, 32, 64, 96, 160, 320),
        (1, 2, 3, 4, 3, 3, 1),
        (1, 2, 2, 2, 1, 2, 1),
        strict=True,
    )
    for expansion, width, size, stride in stages:
        for index in range(size):
            layers.append(Inverted(into, width, 1 if index else stride, expansion))
            into = width
    layers += [conv_bn(into, 1280, 1), nn.ReLU6()]
    return ImageNet(nn.Sequential(*layers), 1280, 1000)


class Vgg(nn.Module):
    """VGG-16 with BatchNorm, flattened to three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        layers, into = [], 3
        for width, repeats in zip((64, 128, 256, 512, 512), (2, 2, 3, 3, 3)):  # noqa: B905
            for _ in range(repeats):
                conv = nn.Conv2d(into, width, 3, padding=1)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
                into = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.dense1, self.dense2 = nn.Linear(512 * 49, 4096), nn.Linear(4096, 4096)
        self.head = nn.Linear(4096, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.dense1(torch.flatten(self.features(x), 1)))
        return self.head(F.relu(self.dense2(x)))


class Attention(nn.Module):
    """Multi-head self-attention with separate projections."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = (self.query(x), self.key(x), self.value(x))
        q, k, v = (y.view(batch, length, self.heads, -1).transpose(1, 2) for y in parts)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if self.causal:
            ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
            logits = logits.masked_fill(ahead, -1e30)
        y = logits.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Vit(nn.Module):
    """Vision Transformer with a class token."""

    def __init__(self, side, patch, width, depth, heads, classes) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        tokens = (side // patch) ** 2 + 1
        self.positions = nn.Parameter(torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*[Block(width, heads, False) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x + self.positions))[:, 0])


class Gpt(nn.Module):
    """GPT-2 with plain linear layers and a head of its own."""

    def __init__(self, width=768, depth=12, heads=12, vocabulary=50257) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(1024, width)
        self.blocks = nn.Sequential(*[Block(width, heads, True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def _images(side: int) -> Tensor:
    return torch.randn(1, 3, side, side)


BUILDERS: dict[str, Callable[..., tuple[nn.Module, Tensor]]] = {
    "mobilenet_v2": lambda: (mobilenet_v2(), _images(224)),
    "resnet50": lambda: (
        resnet((3, 4, 6, 3), (256, 512, 1024, 2048), True, 1000),
        _images(224),
    ),
    "vit_b16": lambda: (Vit(224, 16, 768, 12, 12, 1000), _images(224)),
    "gpt2_small": lambda: (Gpt(), torch.randint(50257, (1, 128))),
    "vgg16_bn": lambda: (Vgg(), _images(224)),
    "densenet121": lambda: (
        densenet((6, 12, 24, 16), 32, 64, True, 1000),
        _images(224),
    ),
    "densenet": lambda layers: (densenet((layers,) * 3, 4, 8, False, 10), _images(32)),
    "vit": lambda blocks: (Vit(32, 8, 32, blocks, 4, 10), _images(32)),
    "resnet": lambda blocks: (
        resnet((blocks // 2, blocks - blocks // 2), (16, 32), False, 10),
        _images(32),
    ),
}
