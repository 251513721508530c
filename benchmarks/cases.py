"""The states that are saved and loaded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from peakpoint.state.capture import StateEncoder


@dataclass(frozen=True)
class Case:
    """One state.

    Attributes:
        name: for tables.
        model: a module.
        optimizer: with the state that it has after a step.
        tensors: everything, by name.
    """

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    tensors: dict[str, torch.Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def state(self):
        """As the checkpointer takes it."""
        return {"model": self.model, "optimizer": self.optimizer}

    def state_dict(self):
        """As everybody else takes it."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def _case(name, shapes, kind, trained=None):
    model = torch.nn.Module()
    for number, shape in enumerate(shapes):
        parameter = torch.nn.Parameter(torch.randn(shape))
        model.register_parameter(f"p{number}", parameter)
        parameter.requires_grad_(trained is None or trained(number))
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "adamw":
        optimizer = torch.optim.AdamW(own)
        for parameter in own:
            moments = {"exp_avg": torch.randn_like(parameter), "exp_avg_sq": torch.rand_like(parameter)}
            optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    else:
        optimizer = torch.optim.SGD(own, lr=0.1, momentum=0.9)
        for parameter in own:
            optimizer.state[parameter] = {"momentum_buffer": torch.randn_like(parameter)}
    _, files = StateEncoder().encode({"model": model, "optimizer": optimizer})
    tensors = {f"{part}.{name}": tensor.detach() for part, given in files.items() for name, tensor in given.items()}
    return Case(name, model, optimizer, tensors)


def gpt2_shapes(scale):
    """The shapes of its parameters."""
    width, words = 64 * max(1, round(12 * scale)), max(64, round(50257 * scale))
    shapes = [(words, width), (1024, width), (width,), (width,)]
    for _ in range(12):
        shapes += [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,), (width,), (width,)]
        shapes += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return shapes


def gpt2(scale):
    """GPT-2 124M in float32 with AdamW."""
    return _case("GPT-2 124M, AdamW", gpt2_shapes(scale), "adamw")


def _resnet50_shapes(scale):
    """The backbone, and how many features come out of it."""
    base = max(4, round(64 * scale))
    shapes = [(base, 3, 7, 7), (base,), (base,)]
    before = base
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = base * 2**stage
        for block in range(blocks):
            shapes += [(width, before, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, before, 1, 1), (4 * width,), (4 * width,)]
            before = 4 * width
    return shapes, before


def resnet50(scale):
    """ResNet-50 with SGD and momentum."""
    shapes, features = _resnet50_shapes(scale)
    return _case("ResNet-50, SGD with momentum", [*shapes, (1000, features), (1000,)], "sgd")


def frozen_resnet50(scale):
    """ResNet-50 frozen, with a new last layer for ten classes and AdamW for that."""
    shapes, features = _resnet50_shapes(scale)
    name = "ResNet-50 frozen, a new last layer, AdamW"
    return _case(name, [*shapes, (10, features), (10,)], "adamw", trained=lambda number: number >= len(shapes))


def tiny(scale):
    """20,000 tiny tensors."""
    return _case("20,000 tiny tensors", [(1 + number % 64,) for number in range(max(10, round(10_000 * scale)))], "sgd")


def large(scale):
    """One tensor of 2 GB, frozen."""
    count = max(1000, round(500_000_000 * scale))
    return _case("one tensor of 2 GB", [(count,), (4,)], "sgd", trained=lambda number: number == 1)


def lora(scale):
    """GPT-2 124M frozen, with 1 % of trained adapters and AdamW for those."""
    shapes = gpt2_shapes(scale)
    adapters = [shape for shape in shapes if len(shape) == 2]
    ranks = [pair for rows, columns in adapters for pair in ((rows, 4), (4, columns))]
    return _case("LoRA: 1 % trained", [*shapes, *ranks], "adamw", trained=lambda number: number >= len(shapes))


CASES: dict[str, Callable[[float], Case]] = {
    "gpt2": gpt2,
    "resnet50": resnet50,
    "tiny": tiny,
    "large": large,
    "lora": lora,
}
