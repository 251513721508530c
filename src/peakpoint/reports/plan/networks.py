"""The known networks of the planner, by the shapes of their tensors."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from peakpoint.errors import ConfigError
from peakpoint.format.names import did_you_mean

Shape = tuple[int, ...]
Shapes = Iterator[Shape]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network.

    Attributes:
        name: for ``--preset``.
        title: the name that its authors gave it.
        dtype: the usual element type of its weights.
        optimizer: the usual one.
        shapes: of every parameter, tied weights once.
        source: where the architecture is described.
    """

    name: str
    title: str
    dtype: str
    optimizer: str
    shapes: tuple[Shape, ...]
    source: str

    @property
    def norms(self) -> tuple[int, ...]:
        """The width of every batch norm, which has means and variances in float32, and a count of eight bytes.

        A convolution without a bias is followed by one, which is as wide as it has outputs.
        """
        is_resnet = self.name.startswith("resnet")
        return tuple(shape[0] for shape in self.shapes if len(shape) == 4) if is_resnet else ()

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(map(math.prod, self.shapes))


def _lenet5() -> Shapes:
    for shape in ((6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)):
        yield from (shape, shape[:1])


def _conv(outputs: int, inputs: int, kernel: int) -> Shapes:
    """A convolution without bias, and the scale and shift of its batch norm."""
    yield from ((outputs, inputs, kernel, kernel), (outputs,), (outputs,))


def _resnet(*blocks: int, bottleneck: bool = False) -> Shapes:
    yield from _conv(64, 3, 7)
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        outputs = 4 * width if bottleneck else width
        for block in range(count):
            if bottleneck:
                yield from (*_conv(width, inputs, 1), *_conv(width, width, 3), *_conv(outputs, width, 1))
            else:
                yield from (*_conv(width, inputs, 3), *_conv(width, width, 3))
            if block == 0 and inputs != outputs:
                yield from _conv(outputs, inputs, 1)
            inputs = outputs
    yield from ((1000, inputs), (1000,))


def _gpt(width: int, layers: int, vocabulary: int, context: int) -> Shapes:
    """A decoder with learned positions, biases everywhere, and the output tied to the embedding."""
    yield from ((vocabulary, width), (context, width))
    for _ in range(layers):
        yield from ((width,), (width,))
        yield from ((width, 3 * width), (3 * width,), (width, width), (width,))
        yield from ((width,), (width,))
        yield from ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    yield from ((width,), (width,))


_RESNETS = "He et al., CVPR 2016"
_KNOWN = (
    ("lenet-5", "LeNet-5", "float32", "adam", _lenet5(), "LeCun et al., Proceedings of the IEEE, 1998"),
    ("resnet-18", "ResNet-18", "float32", "sgd+momentum", _resnet(2, 2, 2, 2), _RESNETS),
    ("resnet-50", "ResNet-50", "float32", "sgd+momentum", _resnet(3, 4, 6, 3, bottleneck=True), _RESNETS),
    ("gpt-2", "GPT-2 small", "float32", "adamw", _gpt(768, 12, 50257, 1024), "Radford et al., 2019"),
    ("gpt-3", "GPT-3 175B", "float16", "adamw", _gpt(12288, 96, 50257, 2048), "Brown et al., NeurIPS 2020"),
)
_BY_NAME = {
    name: Architecture(name, title, dtype, optimizer, tuple(shapes), source)
    for name, title, dtype, optimizer, shapes, source in _KNOWN
}
NAMES = tuple(_BY_NAME)


def architecture(name: str) -> Architecture:
    """Return a known network by its name.

    Raises:
        ConfigError: an unknown name.

    Example:
        >>> architecture("resnet-50").parameters
        25557032
    """
    if name not in _BY_NAME:
        raise ConfigError(f"there is no preset {name!r}{did_you_mean(name, NAMES)}; presets: {', '.join(NAMES)}")
    return _BY_NAME[name]
