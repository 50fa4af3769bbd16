"""Train the zoo's digits_resnet on scikit-learn's digits and pack its weights.

Needs the CPU build of torch, as train_digits_cnn.py does. Run:

    python examples/models/train_digits_resnet.py [OUT.weights.xz]
"""

from __future__ import annotations

import math
import os
import sys

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.zoo.digits import split_of
from benchmarks.zoo.digits_resnet import (
    BLOCKS,
    CLASSES,
    HEAD,
    STEM,
    Block,
    digits_resnet_path,
    make_digits_resnet,
    weight_shapes,
)
from benchmarks.zoo.packed_weights import read_packed, write_packed

SEED = 0
EPOCHS = 60
BATCH = 64
NOISE = 0.05


class ConvNorm(nn.Module):
    """A convolution without bias and its batch norm."""

    def __init__(
        self, channels: int, filters: int, size: int = 1, stride: int = 1, group: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, size, stride, size // 2, groups=group, bias=False)
        self.norm = nn.BatchNorm2d(filters)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) to (batch, filters, h / stride, w / stride)."""
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down."""

    def __init__(self, channels: int, block: Block) -> None:
        super().__init__()
        inner = block.inner
        self.expand = ConvNorm(channels, inner)
        self.depthwise = ConvNorm(inner, inner, 3, block.stride, group=inner)
        self.project = ConvNorm(inner, block.channels)
        self.adds = (block.stride, block.channels) == (1, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) to (batch, block.channels, h / stride, w / stride)."""
        y = functional.relu6(self.depthwise(functional.relu6(self.expand(x))))
        y = self.project(y)
        return x + y if self.adds else y


class Basic(nn.Module):
    """Two 3x3 convolutions, and a projection where the shapes differ."""

    def __init__(self, channels: int, block: Block) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, block.inner, 3, block.stride)
        self.conv2 = ConvNorm(block.inner, block.channels, 3)
        adds = (block.stride, block.channels) == (1, channels)
        self.shortcut = (
            nn.Identity() if adds else ConvNorm(channels, block.channels, 1, block.stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) to (batch, block.channels, h / stride, w / stride)."""
        y = self.conv2(functional.relu(self.conv1(x)))
        return functional.relu(self.shortcut(x) + y)


class DigitsResnet(nn.Module):
    """What `make_digits_resnet` builds as ONNX, with the same names of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, STEM, 3, 2)
        channels = [STEM, *(block.channels for block in BLOCKS)]
        self.blocks = nn.Sequential(
            *(
                (Bottleneck if block.kind == "bottleneck" else Basic)(before, block)
                for before, block in zip(channels, BLOCKS, strict=False)
            )
        )
        self.head = ConvNorm(channels[-1], HEAD)
        self.linear = nn.Linear(HEAD, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (batch, 10) of images (batch, 1, 32, 32)."""
        x = self.blocks(functional.relu6(self.stem(image)))
        return self.linear(functional.relu6(self.head(x)).mean((2, 3)))


def jitter(image: Tensor) -> Tensor:
    """Each image rotated, scaled, shifted and made noisy a little: 997 images are few."""
    count = len(image)
    angle = (torch.rand(count) - 0.5) * math.radians(24)
    scale = 1 + (torch.rand(count) - 0.5) * 0.2
    shift = (torch.rand(count, 2) - 0.5) * 0.4
    rotation = torch.stack(
        [scale * angle.cos(), -scale * angle.sin(), scale * angle.sin(), scale * angle.cos()], 1
    ).reshape(-1, 2, 2)
    grid = functional.affine_grid(
        torch.cat([rotation, shift[:, :, None]], 2), list(image.shape), align_corners=False
    )
    moved = functional.grid_sample(image, grid, align_corners=False)
    return moved + NOISE * torch.randn_like(moved)


def train(x: Tensor, y: Tensor) -> DigitsResnet:
    """Train with AdamW and a one-cycle rate; the seed fixes every draw."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # layers this small do not gain by more
    model = DigitsResnet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = EPOCHS * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=steps)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            logits = model(jitter(x[batch]))
            loss = functional.cross_entropy(logits, y[batch], label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"\repoch {epoch + 1}/{EPOCHS}  loss {loss.item():.4f}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return model.eval()


def main() -> None:
    """Train, pack the weights, check what was packed, print its accuracy on the test samples."""
    split = split_of("resnet")
    model = train(torch.from_numpy(split.x_train), torch.from_numpy(split.y_train))
    out = sys.argv[1] if len(sys.argv) > 1 else str(digits_resnet_path())
    state = model.state_dict()
    write_packed(out, {name: state[name].numpy() for name in weight_shapes()})

    packed = read_packed(out, weight_shapes())
    session = onnxruntime.InferenceSession(
        make_digits_resnet(packed).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(None, {"image": split.x_test})
    model.load_state_dict({**state, **{name: torch.from_numpy(packed[name]) for name in packed}})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(torch.from_numpy(split.x_test)), atol=1e-4)
    weights = sum(parameter.numel() for parameter in model.parameters())
    accuracy = np.mean(logits.argmax(1) == split.y_test)
    print(f"{out}: {weights} weights, {os.path.getsize(out)} bytes, test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
