"""PyTorch's side of the benchmark: the same networks from timm, eager or by torch.compile.

Channels last, bfloat16 by autocast, cuDNN's benchmark on; AdamW and TF32 as PyTorch's defaults are.
"""

import itertools
import os
import shutil
import sys

import torch
import torch.nn.functional as F
from torch import nn

from analysis.speed.worker import NUM_CLASSES, Side, Spec
from errors import UserError

NAMES = {
    "resnet50": "resnet50",
    "efficientnet_b0": "efficientnet_b0",
    "mobilenet_v2": "mobilenetv2_100",
    "vit_s16": "vit_small_patch16_224",
    "vgg16": "vgg16",
}
# As our architectures have them: the share that is dropped before the head, and of whole blocks.
DROPPED = {
    "efficientnet_b0": {"drop_rate": 0.2, "drop_path_rate": 0.2},
    "mobilenet_v2": {"drop_rate": 0.2},
    "vgg16": {"drop_rate": 0.5},
}


def build(spec: Spec) -> Side:
    """Returns the step of training or evaluation of a network, on images on the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if spec.side == "torch_compile" and device.type == "cpu":
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not compiler:
            raise UserError("torch.compile needs a C++ compiler on a CPU: install g++")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    net = network(spec).to(device, memory_format=torch.channels_last)
    net.train(spec.mode == "train")
    shape = (spec.images, spec.image_size, spec.image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    labels = torch.randint(0, NUM_CLASSES, (spec.images,), device=device)
    mean = torch.full((3,), 0.5, device=device).view(3, 1, 1)
    std = torch.full((3,), 0.25, device=device).view(3, 1, 1)
    low = spec.dtype == "bfloat16"

    def forward(pixels: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std  # channels last in memory
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            logits = net(x)
        return F.cross_entropy(logits.float(), targets), logits

    if spec.side == "torch_compile":
        forward = torch.compile(forward)
    take, total = (trainer if spec.mode == "train" else evaluator)(net, forward, device, spec)

    def orders():
        while True:
            yield from torch.randperm(spec.images, device=device).split(spec.batch_size)

    batches = orders()

    def run(steps: int) -> None:
        for rows in itertools.islice(batches, steps):
            take(images[rows], labels[rows])
        if device.type == "cuda":
            torch.cuda.synchronize()

    def device_memory() -> int | None:
        return torch.cuda.max_memory_allocated() if device.type == "cuda" else None

    def check() -> None:
        if not bool(torch.isfinite(total[0])):
            raise UserError("the loss was not finite")

    return Side(run, device_memory, check)


def trainer(net: nn.Module, forward, device: torch.device, spec: Spec):
    """Returns a step of training, and the sums of loss and right answers that it adds to."""
    fused = spec.fused or None
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=1e-4, fused=fused)
    total = torch.zeros(2, device=device)

    def take(pixels: torch.Tensor, targets: torch.Tensor) -> None:
        loss, logits = forward(pixels, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            correct = (logits.argmax(1) == targets).sum()
            total.add_(torch.stack([loss.detach() * len(targets), correct.float()]))

    return take, total


def evaluator(net: nn.Module, forward, device: torch.device, spec: Spec):
    """Returns a step of evaluation, and the sums of loss and right answers that it adds to."""
    del net, spec
    total = torch.zeros(2, device=device)

    @torch.inference_mode()
    def take(pixels: torch.Tensor, targets: torch.Tensor) -> None:
        loss, logits = forward(pixels, targets)
        correct = (logits.argmax(1) == targets).sum()
        total.add_(torch.stack([loss * len(targets), correct.float()]))

    return take, total


def network(spec: Spec) -> nn.Module:
    """Returns a network that takes [B, 3, H, W], without weights from elsewhere."""
    if spec.model == "cnn":
        return cnn(spec.image_size)
    if spec.model == "cnn_deep":
        return cnn_deep()
    if spec.model not in NAMES:
        raise UserError(f"no {spec.model} was chosen in timm for the benchmark")
    import timm

    options = dict(DROPPED.get(spec.model, {}))
    if spec.model == "vit_s16":
        options["img_size"] = spec.image_size
    name = NAMES[spec.model]
    print(f"timm {timm.__version__}: {name}", file=sys.stderr)
    return timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES, **options)


def cnn(size: int) -> nn.Module:
    """The same as models/cnn.py."""
    side = size // 2 // 2
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(side * side * 64, 128), nn.ReLU(), nn.Linear(128, NUM_CLASSES)),
    )


def cnn_deep() -> nn.Module:
    """The same as models/cnn_deep.py."""
    widths, layers = (3, 32, 64, 128, 256), []
    for inputs, outputs in itertools.pairwise(widths):
        for channels in (inputs, outputs):
            conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Dropout(0.1)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(256, NUM_CLASSES))
