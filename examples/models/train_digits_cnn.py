"""Train a small residual CNN on scikit-learn's digits and write it as ONNX.

Needs the CPU build of torch, which no other part of the project uses. Run:

    python examples/models/train_digits_cnn.py [OUT.onnx]
"""

from __future__ import annotations

import math
import sys

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.zoo.digits import digits_cnn_path, load_digits_split

SEED = 0
EPOCHS = 120
BATCH = 64
STEM, WIDTH = 32, 64


class DigitsCnn(nn.Module):
    """8x8 stem, 4x4 body with one residual block, global average, linear: 93k weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, STEM, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.conv2 = nn.Conv2d(STEM, WIDTH, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(WIDTH)
        self.conv3 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(WIDTH)
        self.conv4 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.bn4 = nn.BatchNorm2d(WIDTH)
        self.linear = nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (batch, 10) of images (batch, 1, 8, 8)."""
        x = functional.relu(self.bn1(self.conv1(image)))
        x = functional.max_pool2d(functional.relu(self.bn2(self.conv2(x))), 2)
        y = functional.relu(self.bn3(self.conv3(x)))
        x = functional.relu(x + self.bn4(self.conv4(y)))
        return self.linear(x.mean((2, 3)))


def jitter(image: Tensor) -> Tensor:
    """Each image rotated, scaled and shifted a little: 997 images are few."""
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
    return functional.grid_sample(image, grid, align_corners=False)


def train(x: Tensor, y: Tensor) -> DigitsCnn:
    """Train with AdamW and a one-cycle rate; the seed fixes every draw."""
    torch.manual_seed(SEED)
    model = DigitsCnn()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    steps = EPOCHS * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
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


def to_onnx(model: DigitsCnn) -> onnx.ModelProto:
    """Write the graph by hand, so that BatchNormalization stays a node for the host to fold."""
    initializers = [
        numpy_helper.from_array(value.numpy(), name)
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    ]
    nodes = []

    def conv(index: int, source: str) -> str:
        nodes.append(
            helper.make_node(
                "Conv",
                [source, f"conv{index}.weight", f"conv{index}.bias"],
                [f"conv{index}"],
                name=f"conv{index}",
                kernel_shape=[3, 3],
                pads=[1, 1, 1, 1],
            )
        )
        statistics = [
            f"bn{index}.{part}" for part in ("weight", "bias", "running_mean", "running_var")
        ]
        nodes.append(
            helper.make_node(
                "BatchNormalization",
                [f"conv{index}", *statistics],
                [f"bn{index}"],
                name=f"bn{index}",
                epsilon=1e-5,
            )
        )
        return f"bn{index}"

    def simple(operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    x = simple("Relu", [conv(1, "image")], "relu1")
    x = simple("Relu", [conv(2, x)], "relu2")
    x = simple("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    y = simple("Relu", [conv(3, x)], "relu3")
    x = simple("Relu", [simple("Add", [x, conv(4, y)], "residual")], "relu4")
    x = simple("Flatten", [simple("GlobalAveragePool", [x], "average")], "features", axis=1)
    simple("Gemm", [x, "linear.weight", "linear.bias"], "logits", transB=1)
    graph = helper.make_graph(
        nodes,
        "digits_cnn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        initializers,
    )
    onnx_model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="bapq"
    )
    onnx.checker.check_model(onnx_model, full_check=True)
    return onnx_model


def main() -> None:
    """Train, write the model, print its accuracy on the test samples."""
    split = load_digits_split()
    model = train(torch.from_numpy(split.x_train), torch.from_numpy(split.y_train))
    out = sys.argv[1] if len(sys.argv) > 1 else str(digits_cnn_path())
    onnx.save(to_onnx(model), out)
    with torch.no_grad():
        answers = model(torch.from_numpy(split.x_test)).argmax(1).numpy()
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {weights} weights, test accuracy {np.mean(answers == split.y_test):.4f}")


if __name__ == "__main__":
    main()
