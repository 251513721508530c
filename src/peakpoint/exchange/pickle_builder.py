"""Builds what a pickle describes, and calls nothing that the pickle names but the constructors it is given.

Python's own unpickler imports what a file names, and calls it. Here a name is looked up among those that are allowed,
and every other one is an ``Unbuilt``: a record of a class, of an object or of a call that was not made. So one value of
a strange class does not keep anybody from the rest of a file, and a dict or list with a class of its own keeps its
values.

Source: PyTorch, ``torch/_weights_only_unpickler.py``, for the operations that ``torch.save`` uses.
"""

import argparse
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch


class Unbuilt:
    """A record of something that was not built: its class or function, and what it would have been built from.

    Attributes:
        name: the full name of the class or function.
        arguments: of the call; None when nothing was called, and this is the class or function itself.
        state: what the object would have taken as its attributes.
        values: the elements of a list, and the entries of a dict, with a class of its own.
    """

    def __init__(self, name: str, arguments: tuple[Any, ...] | None = None) -> None:
        self.name, self.arguments, self.state = name, arguments, None
        self.values: list[Any] | dict[Any, Any] | None = None

    def called(self, arguments: tuple[Any, ...]) -> "Unbuilt":
        """Return the record of a call of this."""
        if self.name == "builtins.getattr" and len(arguments) == 2 and isinstance(arguments[0], Unbuilt):
            return Unbuilt(f"{arguments[0].name}.{arguments[1]}"[:300])  # an inner class, or a method
        return Unbuilt(self.name, arguments)


class StandIn:
    """Base of stand-ins that take the state which the pickle has for them."""

    def __setstate__(self, state: Any) -> None:
        """Take the state."""
        raise NotImplementedError


def global_name(data: bytes, place: int) -> str:
    """Return the full name that a ``GLOBAL`` at a place of a pickle has, where Python 3 has what it means."""
    module_end = data.index(b"\n", place + 1)
    name_end = data.index(b"\n", module_end + 1)
    module, name = (
        part.decode("utf-8", "replace") for part in (data[place + 1 : module_end], data[module_end + 1 : name_end])
    )
    names, modules = torch._utils.NAME_MAPPING, torch._utils.IMPORT_MAPPING  # noqa: SLF001 - as torch.load
    module, name = names.get((module, name), (module, name))
    return f"{modules.get(module, module)}.{name}"


class PickleBuilder:
    """Builds the value of one pickle, of protocol 2 as ``torch.save`` writes it, or of 4.

    Args:
        constructors: full names to what may be called.
        values: full names to what may be named, and is never called.
        storage: returns the storage for the description of one.
    """

    def __init__(
        self,
        constructors: Mapping[str, Callable[..., Any]],
        values: Mapping[str, Any],
        storage: Callable[[tuple[Any, ...]], Any],
    ) -> None:
        self._constructors, self._values, self._storage = constructors, values, storage
        self._callable = {id(constructor) for constructor in constructors.values()}
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self, data: bytes) -> Any:
        """Build the value.

        Raises:
            pickle.UnpicklingError: ``torch.save`` did not write the pickle; so does whatever a constructor raises.
        """
        for operation, argument, place in pickletools.genops(data):
            name = operation.name
            if name in _PUSHED:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name == "GLOBAL":
                self._stack.append(self.named(global_name(data, place or 0)))
            elif name in _WITH_ARGUMENT:
                _WITH_ARGUMENT[name](self, argument)
            elif name in _STEPS:
                _STEPS[name](self)
            elif name not in {"PROTO", "FRAME", "STOP"}:
                raise pickle.UnpicklingError(f"no checkpoint needs {name}")
        return self._stack.pop()

    def named(self, name: str) -> Any:
        """Return what a name means, which is a record where nothing is allowed under it."""
        return self._constructors.get(name) or self._values.get(name) or Unbuilt(name)

    def named_on_stack(self) -> None:
        """Replace the texts of a module and a name by what they mean."""
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise pickle.UnpicklingError("a name that is no text")
        self._stack.append(self.named(f"{module}.{name}"))

    def python2_text(self, argument: str) -> None:
        """Push a text of Python 2."""
        self._stack.append(argument.encode("latin-1").decode())

    def get(self, argument: int) -> None:
        """Push a value that was memorized."""
        self._stack.append(self._memo[argument])

    def put(self, argument: int) -> None:
        """Memorize the last value."""
        self._memo[argument] = self._stack[-1]

    def memoize(self) -> None:
        """Memorize the last value under the next number."""
        self.put(len(self._memo))

    def mark(self) -> None:
        """Begin the values of a container."""
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._marked.pop()
        return values

    def tuple_of(self, length: int | None) -> None:
        """Replace values by a tuple of them."""
        values = self._since_mark() if length is None else [self._stack.pop() for _ in range(length)][::-1]
        self._stack.append(tuple(values))

    def reduce(self) -> None:
        """Call what is allowed to be called; a record of everything else."""
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("arguments that are no tuple")
        if isinstance(function, Unbuilt):
            self._stack.append(function.called(arguments))
        elif id(function) in self._callable:
            self._stack.append(function(*arguments))
        else:
            raise pickle.UnpicklingError("a call of something that is no function")

    def build(self) -> None:
        """Give an object its state."""
        state = self._stack.pop()
        value = self._stack[-1]
        if isinstance(value, Unbuilt):
            value.state = state
        elif isinstance(value, StandIn):
            value.__setstate__(state)
        elif type(value) is argparse.Namespace:
            vars(value).update({str(name): attribute for name, attribute in state.items()})
        elif type(value) is OrderedDict:
            vars(value).update({name: state[name] for name in ("_metadata",) if name in state})  # of a state dict
        elif type(value) is torch.Tensor:  # as torch before 1.0 saved it
            value.set_(*state)
        elif type(value) is torch.nn.Parameter:
            value.__setstate__(state)  # type: ignore[no-untyped-call]
        else:
            raise pickle.UnpicklingError("a state for an object that has none")

    def append(self, *, several: bool) -> None:
        """Add elements to a list."""
        values = self._since_mark() if several else [self._stack.pop()]
        target = self._stack[-1]
        if isinstance(target, Unbuilt):
            target.values = target.values if isinstance(target.values, list) else []
            target = target.values
        if type(target) is not list:
            raise pickle.UnpicklingError("elements for something that is no list")
        target.extend(values)

    def set_items(self, *, several: bool) -> None:
        """Add entries to a dict."""
        values = self._since_mark() if several else [self._stack.pop() for _ in range(2)][::-1]
        target = self._stack[-1]
        if isinstance(target, Unbuilt):
            target.values = target.values if isinstance(target.values, dict) else {}
            target = target.values
        if type(target) not in (dict, OrderedDict):
            raise pickle.UnpicklingError("entries for something that is no dict")
        target.update(zip(values[::2], values[1::2], strict=True))

    def persistent(self) -> None:
        """Replace an id by the storage that has it."""
        pid = self._stack.pop()
        if not isinstance(pid, tuple) or not pid or pid[0] not in ("storage", b"storage"):
            raise pickle.UnpicklingError("a reference to something that is no storage")
        self._stack.append(self._storage(pid[1:]))


_PUSHED = frozenset({"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "LONG1"})
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_WITH_ARGUMENT: dict[str, Callable[[PickleBuilder, Any], None]] = {
    "SHORT_BINSTRING": PickleBuilder.python2_text,
    **dict.fromkeys(("BINGET", "LONG_BINGET"), PickleBuilder.get),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), PickleBuilder.put),
}
_STEPS: dict[str, Callable[[PickleBuilder], None]] = {
    "STACK_GLOBAL": PickleBuilder.named_on_stack,
    "MEMOIZE": PickleBuilder.memoize,
    "MARK": PickleBuilder.mark,
    "TUPLE": lambda builder: builder.tuple_of(None),
    "TUPLE1": lambda builder: builder.tuple_of(1),
    "TUPLE2": lambda builder: builder.tuple_of(2),
    "TUPLE3": lambda builder: builder.tuple_of(3),
    "REDUCE": PickleBuilder.reduce,
    "NEWOBJ": PickleBuilder.reduce,
    "BUILD": PickleBuilder.build,
    "APPEND": lambda builder: builder.append(several=False),
    "APPENDS": lambda builder: builder.append(several=True),
    "SETITEM": lambda builder: builder.set_items(several=False),
    "SETITEMS": lambda builder: builder.set_items(several=True),
    "BINPERSID": PickleBuilder.persistent,
}
