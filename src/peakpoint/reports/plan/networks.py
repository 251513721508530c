"""A few well-known networks, by the shapes of their tensors: the presets of the planner."""

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
        name: as it is given to ``--preset``.
        title: as its authors call it.
        dtype: in which its weights are usually kept.
        optimizer: with which it is usually trained.
        shapes: of every parameter, tied weights once.
        norms: the width of every batch norm, which keeps so many means and variances in float32 beside them, and counts
            its batches in an integer of eight bytes.
        source: where the architecture is described.
    """

    name: str
    title: str
    dtype: str
    optimizer: str
    shapes: tuple[Shape, ...]
    norms: tuple[int, ...]
    source: str

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(map(math.prod, self.shapes))


def _lenet5() -> Shapes:
    for shape in ((6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)):
        yield from (shape, shape[:1])


def _conv(out: int, into: int, kernel: int) -> Shapes:
    """A convolution without bias, and the scale and shift of its batch norm."""
    yield from ((out, into, kernel, kernel), (out,), (out,))


def _resnet(*blocks: int, bottleneck: bool = False) -> Shapes:
    yield from _conv(64, 3, 7)
    into = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        out = 4 * width if bottleneck else width
        for block in range(count):
            if bottleneck:
                yield from (*_conv(width, into, 1), *_conv(width, width, 3), *_conv(out, width, 1))
            else:
                yield from (*_conv(width, into, 3), *_conv(width, width, 3))
            if block == 0 and into != out:
                yield from _conv(out, into, 1)
            into = out
    yield from ((1000, into), (1000,))


def _gpt(width: int, layers: int, vocabulary: int, context: int) -> Shapes:
    """A decoder with learned positions, biases everywhere, and the output tied to the embedding."""
    yield from ((vocabulary, width), (context, width))
    for _ in range(layers):
        yield from ((width,), (width,))
        yield from ((width, 3 * width), (3 * width,), (width, width), (width,))
        yield from ((width,), (width,))
        yield from ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    yield from ((width,), (width,))


def _network(name: str, title: str, dtype: str, optimizer: str, shapes: Shapes, source: str) -> Architecture:
    listed = tuple(shapes)
    # a convolution without a bias is followed by a batch norm, which is as wide as it has outputs
    norms = tuple(shape[0] for shape in listed if len(shape) == 4) if name.startswith("resnet") else ()
    return Architecture(name, title, dtype, optimizer, listed, norms, source)


_RESNETS = "He et al., CVPR 2016"
_ALL = (
    _network("lenet-5", "LeNet-5", "float32", "adam", _lenet5(), "LeCun et al., Proceedings of the IEEE, 1998"),
    _network("resnet-18", "ResNet-18", "float32", "sgd+momentum", _resnet(2, 2, 2, 2), _RESNETS),
    _network("resnet-50", "ResNet-50", "float32", "sgd+momentum", _resnet(3, 4, 6, 3, bottleneck=True), _RESNETS),
    _network("gpt-2", "GPT-2 small", "float32", "adamw", _gpt(768, 12, 50257, 1024), "Radford et al., 2019"),
    _network("gpt-3", "GPT-3 175B", "float16", "adamw", _gpt(12288, 96, 50257, 2048), "Brown et al., NeurIPS 2020"),
)
_BY_NAME = {one.name: one for one in _ALL}
NAMES = tuple(_BY_NAME)


def architecture(name: str) -> Architecture:
    """A preset by name.

    Raises:
        ConfigError: there is none of that name; names near ones.

    Example:
        >>> architecture("resnet-50").parameters
        25557032
    """
    if name not in _BY_NAME:
        raise ConfigError(f"there is no preset {name!r}{did_you_mean(name, NAMES)}; presets: {', '.join(NAMES)}")
    return _BY_NAME[name]
