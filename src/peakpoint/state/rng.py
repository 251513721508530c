"""The random number generators that a training uses: Python's, NumPy's, torch's on the CPU and on every CUDA device."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from peakpoint.errors import FormatError

_MT19937_WORDS = 624
_PHILOX_WORDS = 4


def take() -> dict[str, Any]:
    """Return the state of every generator, as a tree that needs no tensor file."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global one is what loops use
    return pack(random.getstate(), numpy_state, torch.get_rng_state(), cuda, mps)


def pack(
    python: tuple[Any, ...] | None,
    numpy: Any,
    cpu: torch.Tensor | None,
    cuda: Sequence[torch.Tensor] = (),
    mps: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Return the states of generators as a tree that needs no tensor file; None for those that were not saved."""
    algorithm, keys, position, has_gauss, gauss = numpy or ("", (), 0, 0, 0.0)
    key = np.asarray(keys).astype("<u4").tobytes()
    return {
        "python": None if python is None else _pack(python),
        "numpy": numpy and (str(algorithm), key, int(position), int(has_gauss), float(gauss)),
        "torch": None if cpu is None else _bytes(cpu),
        "cuda": [_bytes(state) for state in cuda],
        "mps": None if mps is None else _bytes(mps),
    }


def seeded(seed: int) -> dict[str, Any]:
    """Return the states that generators have right after they were seeded, as ``take`` returns them.

    Example:
        >>> _ = restore(seeded(7))
        >>> torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(7)))
        True
    """
    python = random.Random(seed).getstate()  # noqa: S311 - of a training
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    cuda = [torch.Generator(f"cuda:{index}").manual_seed(seed).get_state() for index in devices]
    mps = torch.Generator("mps").manual_seed(seed).get_state() if torch.backends.mps.is_available() else None
    cpu = torch.Generator().manual_seed(seed).get_state()
    return pack(python, np.random.RandomState(seed % 2**32).get_state(), cpu, cuda, mps)


def seed_anew(generator: Any, seed: int) -> None:
    """Seed one generator of torch, NumPy or Python."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed % 2**32)
    else:
        generator.seed(seed)


def restore(state: dict[str, Any]) -> list[str]:
    """Set every generator to the state that ``take`` returned.

    Returns:
        One sentence for each generator that could not be restored: its device is not here, or another tool has not
        saved it.

    Raises:
        FormatError: the state was not returned by ``take`` or ``pack``.
    """
    names = {"python": "Python's generator", "numpy": "NumPy's generator", "torch": "torch's generator on the CPU"}
    missing = [
        f"{name}: it is not in this checkpoint, and stays as it is"
        for key, name in names.items()
        if state.get(key) is None
    ]
    try:
        if state["python"] is not None:
            random.setstate(_unpack(state["python"]))
        if state["numpy"] is not None:
            algorithm, keys, position, has_gauss, gauss = state["numpy"]
            key = np.frombuffer(keys, dtype="<u4")
            check_numpy({"bit_generator": algorithm, "state": {"key": key, "pos": position}})
            np.random.set_state((algorithm, key, position, has_gauss, gauss))  # noqa: NPY002
        if state["torch"] is not None:
            torch.set_rng_state(_tensor(state["torch"]))
        cuda = state["cuda"]
        count = torch.cuda.device_count() if cuda else 0
        for index, saved in enumerate(cuda[:count]):
            torch.cuda.set_rng_state(_tensor(saved), index)
        missing += [f"the generator of cuda:{index}: there is no such device here" for index in range(count, len(cuda))]
        if state["mps"] is not None:
            if torch.backends.mps.is_available():
                torch.mps.set_rng_state(_tensor(state["mps"]))
            else:
                missing.append("the generator of mps: there is no such device here")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"the checkpoint's generator states cannot be read: {error!r}") from error
    return missing


def take_from(generator: Any) -> Any:
    """Return the state of one generator of torch, NumPy or Python, as a tree that needs no tensor file."""
    if isinstance(generator, torch.Generator):
        return _bytes(generator.get_state())
    if isinstance(generator, random.Random):
        return _pack(generator.getstate())
    if isinstance(generator, np.random.Generator):
        return _without_arrays(generator.bit_generator.state)
    return _without_arrays(generator.get_state(legacy=False))


def restore_to(generator: Any, state: Any) -> None:
    """Set one generator to the state that ``take_from`` returned.

    Raises:
        FormatError: the state is not that of such a generator.
    """
    try:
        if isinstance(generator, torch.Generator):
            generator.set_state(_tensor(state))
        elif isinstance(generator, random.Random):
            generator.setstate(_unpack(state))
        else:
            numbers = _with_arrays(state)
            check_numpy(numbers)
            if isinstance(generator, np.random.Generator):
                generator.bit_generator.state = numbers
            else:
                generator.set_state(numbers)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"the state of a generator of the loader cannot be read: {error!r}") from error


def _without_arrays(state: Any) -> Any:
    """Return the state of a NumPy generator with the dtype and the bytes of each array in its place."""
    if isinstance(state, dict):
        return {name: _without_arrays(value) for name, value in state.items()}
    return (state.dtype.str, state.tobytes()) if isinstance(state, np.ndarray) else state


def _with_arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _with_arrays(value) for name, value in state.items()}
    return np.frombuffer(state[1], dtype=state[0]) if isinstance(state, tuple) else state


def check_numpy(state: Any) -> None:
    """Refuse positions outside of the buffers in the state of a NumPy generator: NumPy reads where they say.

    Raises:
        ValueError: a position outside of its buffer.
    """
    if state["bit_generator"] == "MT19937" and not (
        len(state["state"]["key"]) == _MT19937_WORDS and 0 <= state["state"]["pos"] <= _MT19937_WORDS
    ):
        raise ValueError("the state of MT19937 has a position outside of its buffer")
    if state["bit_generator"] == "Philox" and not 0 <= state["buffer_pos"] <= len(state["buffer"]) == _PHILOX_WORDS:
        raise ValueError("the state of Philox has a position outside of its buffer")


def _pack(state: tuple[Any, ...]) -> tuple[int, bytes, float | None]:
    """Return the state of Python's generator with its 625 integers as bytes."""
    version, integers, gauss = state
    return version, np.asarray(integers, dtype="<u4").tobytes(), gauss


def _unpack(state: tuple[int, bytes, float | None]) -> tuple[Any, ...]:
    version, data, gauss = state
    return version, tuple(np.frombuffer(data, dtype="<u4").tolist()), gauss


def _bytes(state: torch.Tensor) -> bytes:
    return bytes(state.cpu().numpy().tobytes())


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
