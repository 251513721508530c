"""Lossless packing of tensor bytes: differences to neighbours, byte planes, zstd.

Numbers of one tensor a few steps apart are close to one another. So the bits of floats are mapped to integers that keep
their order, the integer of the neighbour is subtracted (or the one that a straight line through two neighbours
predicts), small differences of either sign become small numbers, and the bytes of equal weight are put side by side, so
that zstd finds the ones that hardly vary. Where many values are zero, which ones is stored as bits of their own, as a
difference to the neighbour's, and only the others are packed.

Sources: Collet and Kucherawy, "Zstandard", RFC 8878, 2021; Hershcovitch et al., "ZipNN: Lossless Compression for AI
Models", 2024 (byte planes of weights); Lindstrom and Isenburg, "Fast and Efficient Compression of Floating-Point Data",
IEEE TVCG 2006 (ordered integers and residuals).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from peakpoint.errors import CorruptError

Integers = NDArray[Any]
Bytes = bytes | bytearray | memoryview

LEVELS = {"raw": 3, "plain": 3, "delta": 1, "trend": 1}
"""zstd's levels: differences take most of the time, and a longer search finds little more in them."""

_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 4}
_INTEGERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_SAMPLES, _SAMPLE = 4, 8192  # so many runs of so many integers decide which method is best
_SPARSE = 0.1  # share of zeros from which a mask of them saves more than it takes

RAW, SAME, PLAIN, DELTA, TREND = "raw", "same", "plain", "delta", "trend"
_BASES = {RAW: 0, SAME: 1, PLAIN: 0, DELTA: 1, TREND: 2}


def bases_of(method: str) -> int:
    """Return how many neighbours a method needs.

    Raises:
        CorruptError: there is no such method.
    """
    try:
        return _BASES[method.removesuffix("-sparse")]
    except KeyError:
        raise CorruptError(f"an archive uses the method {method!r}, which this release does not know") from None


def pack(data: Bytes, dtype: str, bases: Sequence[Bytes] = (), level: int | None = None) -> tuple[str, bytes]:
    """Pack bytes so that ``unpack`` gives them back bit for bit.

    Args:
        data: the bytes.
        dtype: safetensors' name of the element type; any other text for bytes without structure.
        bases: the same bytes of up to two neighbours, the nearest first; each as long as ``data``.
        level: of zstd; None for the usual.

    Returns:
        The method, and the packed bytes.

    Example:
        >>> import numpy as np
        >>> before = np.linspace(0, 1, 1000, dtype=np.float32)
        >>> now = before * np.float32(1.0001)
        >>> method, packed = pack(now.tobytes(), "F32", [before.tobytes()])
        >>> method, unpack(packed, "F32", method, now.nbytes, [before.tobytes()]) == now.tobytes()
        ('delta', True)
    """
    if bases and memoryview(data) == memoryview(bases[0]):
        return SAME, b""
    width = _width(dtype)
    if width == 1 or len(data) % width:
        return RAW, _compress(bytes(data), level or LEVELS[RAW])
    integers, base_integers = _integers(data, dtype), [_integers(base, dtype) for base in bases]
    sparse = bool(np.count_nonzero(integers) < (1 - _SPARSE) * len(integers))
    sample = _sample(integers, base_integers)
    possible = (PLAIN, DELTA, TREND)[: len(bases) + 1]
    method = min(possible, key=lambda method: len(_encode(*sample, dtype, method, sparse, 1)))
    packed = _encode(integers, base_integers, dtype, method, sparse, level or LEVELS[method])
    return (f"{method}-sparse" if sparse else method), packed


def unpack(packed: Bytes, dtype: str, method: str, size: int, bases: Sequence[Bytes] = ()) -> bytes:
    """Give back the bytes that ``pack`` was given.

    Args:
        packed: what ``pack`` returned.
        dtype: as given to ``pack``.
        method: as returned by it.
        size: number of bytes that were packed.
        bases: the neighbours that the method needs, see ``bases_of``.

    Raises:
        CorruptError: ``pack`` cannot have made these bytes of ``size`` bytes.
    """
    if len(bases) < bases_of(method) or any(len(base) != size for base in bases):
        raise CorruptError("an archive refers to neighbours that do not exist")
    if method == SAME:
        return bytes(bases[0])
    if method == RAW:
        return _decompress(packed, size)
    width = _width(dtype)
    if size % width:
        raise CorruptError(f"an archive holds {size} bytes of {dtype}, which is not a whole number of elements")
    base_integers = [_integers(base, dtype) for base in bases[: bases_of(method)]]
    return _decode(packed, base_integers, dtype, method, size // width).tobytes()


def _width(dtype: str) -> int:
    return _FLOATS.get(dtype) or _INTEGERS.get(dtype, 1)


def _integers(data: Bytes, dtype: str) -> Integers:
    return np.frombuffer(data, f"<u{_width(dtype)}")


def _sample(integers: Integers, bases: Sequence[Integers]) -> tuple[Integers, list[Integers]]:
    if len(integers) <= 2 * _SAMPLES * _SAMPLE:
        return integers, list(bases)
    starts = np.linspace(0, len(integers) - _SAMPLE, _SAMPLES).astype(int)
    return _picked(integers, starts), [_picked(base, starts) for base in bases]


def _picked(integers: Integers, starts: Integers) -> Integers:
    return np.concatenate([integers[start : start + _SAMPLE] for start in starts])


def _encode(integers: Integers, bases: Sequence[Integers], dtype: str, method: str, sparse: bool, level: int) -> bytes:  # noqa: FBT001
    mask, bases = b"", bases[: _BASES[method]]
    if sparse:
        nonzero = integers != 0
        mask = _compress(np.packbits(nonzero ^ (bases[0] != 0) if bases else nonzero).tobytes(), level)
        integers, bases = integers[nonzero], [base[nonzero] for base in bases]
    residuals = _residuals(integers, _predicted(bases, dtype, method), dtype)
    planes = np.ascontiguousarray(residuals.view(np.uint8).reshape(len(residuals), residuals.itemsize).T)
    body = _compress(planes.tobytes(), level)
    return (len(mask).to_bytes(4, "little") + mask + body) if sparse else body


def _decode(packed: Bytes, bases: Sequence[Integers], dtype: str, method: str, count: int) -> Integers:
    sparse, width, nonzero = method.endswith("-sparse"), _width(dtype), None
    method = method.removesuffix("-sparse")
    if sparse:
        view = memoryview(packed)
        end = 4 + int.from_bytes(view[:4], "little")
        mask, packed = view[4:end], view[end:]
        bits = np.frombuffer(_decompress(mask, (count + 7) // 8), np.uint8)
        nonzero = np.unpackbits(bits, count=count).astype(bool)
        if bases:
            nonzero ^= bases[0] != 0
        bases = [base[nonzero] for base in bases]
    stored = count if nonzero is None else int(np.count_nonzero(nonzero))
    planes = np.frombuffer(_decompress(packed, stored * width), np.uint8).reshape(width, stored)
    residuals = np.ascontiguousarray(planes.T).view(f"<u{width}").reshape(stored)
    integers = _restored(residuals, _predicted(bases, dtype, method), dtype)
    if nonzero is None:
        return integers
    full = np.zeros(count, integers.dtype)
    full[nonzero] = integers
    return full


def _signs(integers: Integers) -> Integers:
    """Set all bits where the highest is set, and none elsewhere."""
    return (integers.view(f"<i{integers.itemsize}") >> (8 * integers.itemsize - 1)).view(integers.dtype)


def _sign_bit(integers: Integers) -> Any:
    return integers.dtype.type(1 << (8 * integers.itemsize - 1))


def _ordered(integers: Integers, dtype: str) -> Integers:
    """Map bits of floats to integers in the order of the floats: a bijection, NaN and both zeros included."""
    if dtype not in _FLOATS:
        return integers
    flips = _signs(integers)
    flips |= _sign_bit(integers)
    flips ^= integers
    return flips


def _from_ordered(ordered: Integers, dtype: str) -> Integers:
    if dtype not in _FLOATS:
        return ordered
    flips = ~_signs(ordered)
    flips |= _sign_bit(ordered)
    flips ^= ordered
    return flips


def _predicted(bases: Sequence[Integers], dtype: str, method: str) -> Integers | None:
    if method == PLAIN:
        return None
    near = _ordered(bases[0], dtype)
    return near if method == DELTA else near + near - _ordered(bases[1], dtype)  # modulo 2 ** bits


def _residuals(integers: Integers, predicted: Integers | None, dtype: str) -> Integers:
    if predicted is None:
        return integers
    difference = _ordered(integers, dtype) - predicted
    signs = _signs(difference)
    difference <<= 1  # the sign goes into the last bit
    difference ^= signs
    return difference


def _restored(residuals: Integers, predicted: Integers | None, dtype: str) -> Integers:
    if predicted is None:
        return residuals
    signs = residuals & residuals.dtype.type(1)
    np.negative(signs, out=signs)
    signs ^= residuals >> residuals.dtype.type(1)
    signs += predicted
    return _from_ordered(signs, dtype)


def _compress(data: bytes, level: int) -> bytes:
    return zstandard.ZstdCompressor(level=level, write_checksum=False).compress(data)


def _decompress(data: Bytes, size: int) -> bytes:
    """Decompress to ``size`` bytes; never makes more, whatever the input says."""
    try:
        if zstandard.get_frame_parameters(data).content_size == size:
            return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise CorruptError(f"an archive is damaged: {error}") from error
    raise CorruptError("an archive is damaged: a piece has another size than its index says")
