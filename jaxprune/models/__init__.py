"""Reference models in Flax Linen for experiments and tests.

Every model maps images [batch, height, width, channels] to logits, `SegNet` and `FCN`
to logits of every pixel, by `model.apply(variables, images, train=False)`. BatchNorm
statistics live in the collection `batch_stats`, dropout asks for the `dropout` stream
only where its rate is not 0. Widths can be given layer by layer, so that a pruned net
has a hand-built twin.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import flax.linen as nn

from ._layers import TargetedDropout as TargetedDropout
from ._layers import glorot_relu
from ._lenet import LeNet5 as LeNet5
from ._lenet import LeNet300 as LeNet300
from ._mobilenet import MobileNetV1 as MobileNetV1
from ._mobilenet import MobileNetV2 as MobileNetV2
from ._resnet import ResNet as ResNet
from ._resnet import cifar_resnet as cifar_resnet
from ._resnet import imagenet_resnet as imagenet_resnet
from ._segmentation import FCN as FCN
from ._segmentation import SegNet as SegNet
from ._vgg import VGG as VGG
from ._vgg import cifar_vgg as cifar_vgg
from ._vgg import imagenet_vgg as imagenet_vgg
from ._vgg import vgg_widths as vgg_widths
from ._vit import ViT as ViT
from ._wrn import WideResNet as WideResNet
from ._wrn import wide_resnet as wide_resnet

# Khan and Stavness, "Pruning Convolutional Filters using Batch Bridgeout", 2020
# (arXiv:2009.10893), as their experiments build the nets: biases beside BatchNorm,
# Glorot's initialiser, the ResNet without ResNet-34's last group (28 layers).
_bridgeout = {"use_bias": True, "kernel_init": glorot_relu}

MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "lenet300": LeNet300,
        "lenet5": LeNet5,
        "vgg11_bn": partial(cifar_vgg, 11),
        "vgg13_bn": partial(cifar_vgg, 13),
        "vgg16_bn": partial(cifar_vgg, 16),
        "vgg19_bn": partial(cifar_vgg, 19),
        "vgg16_bn_imagenet": partial(imagenet_vgg, 16),
        "vgg19_bn_imagenet": partial(imagenet_vgg, 19),
        "vgg_digits": partial(VGG, widths=(16, 16, "M", 32, 32, "M", 64, 64)),
        "resnet20": partial(cifar_resnet, 20),
        "resnet32": partial(cifar_resnet, 32),
        "resnet56": partial(cifar_resnet, 56),
        "resnet110": partial(cifar_resnet, 110),
        "resnet_digits": partial(cifar_resnet, 8, shortcut="projection"),
        "resnet18": partial(imagenet_resnet, 18),
        "resnet34": partial(imagenet_resnet, 34),
        "resnet50": partial(imagenet_resnet, 50),
        "wrn28_10": partial(wide_resnet, 28, 10),
        "bridgeout_vgg16": partial(cifar_vgg, 16, **_bridgeout),
        "bridgeout_resnet28": partial(
            ResNet, stage_sizes=(3, 4, 6), widths=(16, 32, 64), **_bridgeout
        ),
        "bridgeout_wrn28_10": partial(
            wide_resnet, 28, 10, strided_conv=2, shortcut_from="input", **_bridgeout
        ),
        "mobilenet_v1": MobileNetV1,
        "mobilenet_v2": MobileNetV2,
        "segnet": SegNet,
        "fcn32s": FCN,
        "fcn8s": partial(FCN, skips=2),
        "segnet_scenes": partial(SegNet, stages=((8, 8), (16, 16), (32, 32))),
        "vit_b16": ViT,
        "vit_tiny": partial(ViT, width_multiplier=0.25),
    }
)
"""Constructors by name: `MODELS["resnet20"](num_classes=100)`."""
