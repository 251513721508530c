"""Peakpoint keeps, finds and ships the best checkpoints of a model's training.

::

    import peakpoint as pp

    with pp.Checkpointer("runs", run="resnet50", state={"model": model, "optimizer": optimizer},
                         keep=[pp.Best("val_accuracy", "max"), pp.Last(3)]) as ckpt:
        for epoch in ckpt.epochs(100):
            train_one_epoch(...)
            ckpt.report(val_accuracy=accuracy)

The public names stand in ``__init__.pyi``, which type checkers read too. Each is imported when it is first used
(PEP 562), so that importing the package costs milliseconds and never imports torch.
"""

import importlib
import re
from pathlib import Path
from typing import Any

_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_PUBLIC = {
    name: (module, attribute) for module, attribute, name in re.findall(r"from (\S+) import (\w+) as (\w+)", _STUB)
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'peakpoint' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    try:
        if module == __name__:
            return importlib.import_module(f"peakpoint.{attribute}")
        value = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "numpy"):
            raise
        raise ModuleNotFoundError(
            f"peakpoint.{name} needs {error.name}, which is not installed: pip install 'peakpoint[torch]', or install "
            "the build of torch that fits your machine first (https://pytorch.org/get-started)",
            name=error.name,
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
