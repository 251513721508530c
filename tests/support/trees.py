"""When two trees are the same."""

import datetime as dt
import decimal
import struct
import zoneinfo
from collections import OrderedDict, defaultdict, deque

import numpy as np
import torch


def same(a, b):  # noqa: PLR0912
    """Equal in type, value, bits, order, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return same_tensor(a, b)
    if isinstance(a, np.ndarray):
        return same_array(a, b)
    if isinstance(a, np.str_ | np.bytes_):
        return len(a) == len(b) and list(a) == list(b)  # their own == drops zeros at the end
    if isinstance(a, np.longdouble):
        return a == b  # some of its bytes are padding
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if type(a) is int:
        return a == b
    if isinstance(a, float):
        return bits(a) == bits(b)
    if isinstance(a, complex):
        return (bits(a.real), bits(a.imag)) == (bits(b.real), bits(b.imag))
    if isinstance(a, decimal.Decimal):
        return a.as_tuple() == b.as_tuple()
    if isinstance(a, OrderedDict) and not same(getattr(a, "_metadata", None), getattr(b, "_metadata", None)):
        return False
    if isinstance(a, defaultdict) and a.default_factory is not b.default_factory:
        return False
    if isinstance(a, deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, dict):
        return same_pairs(a, b)
    if isinstance(a, set | frozenset):
        return len(a) == len(b) and all(any(same(x, y) for y in b) for x in a)
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dt.datetime | dt.time):
        return a.replace(tzinfo=None) == b.replace(tzinfo=None) and a.fold == b.fold and same_zone(a.tzinfo, b.tzinfo)
    return a == b and repr(a) == repr(b)


def bits(number):
    return struct.pack(">d", number)


def same_tensor(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.requires_grad == b.requires_grad
        and getattr(a, "_is_buffer", False) == getattr(b, "_is_buffer", False)
        and tensor_bytes(a) == tensor_bytes(b)
    )


def same_array(a, b):
    return (
        a.dtype == b.dtype
        and a.dtype.type is b.dtype.type
        and a.shape == b.shape
        and a.tobytes() == b.tobytes()
        and a.flags.f_contiguous == b.flags.f_contiguous
        and b.flags.writeable
    )


def same_zone(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, zoneinfo.ZoneInfo):
        return a.key == b.key
    return a == b and repr(a) == repr(b)


def same_pairs(a, b):
    return len(a) == len(b) and all(
        same(k, m) and same(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
    )


def tensor_bytes(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
