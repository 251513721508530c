"""Export to ONNX. The model comes from a function that the user names on purpose: it is the only code that is run."""

import importlib
import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peakpoint.errors import ConfigError, FormatError, MismatchError, needing
from peakpoint.exchange.exports.files import check_free, published
from peakpoint.format.manifest import Manifest
from peakpoint.models.load import load
from peakpoint.repository.root import Repository
from peakpoint.state.functions import load_function

_INPUT = re.compile(r"(\d+(?:x\d+)*)(?::(\w+))?")
_LARGEST = 1_900_000_000  # bytes: one file of protobuf holds no more than 2 GiB
_SMALL = 100_000_000  # bytes, up to which the slow reference evaluator is asked
_OF_THE_USER = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def export_onnx(
    repository: Repository, ref: str, to: Path, factory: str, inputs: Sequence[str] = (), part: str = "model"
) -> tuple[Manifest, str]:
    """Write a checkpoint as an ONNX model; atomic and durable. The file is checked, and run if it is small.

    Args:
        repository: where from.
        ref: which checkpoint.
        to: the file; must not exist.
        factory: ``"module:function"``, found from the present directory; the function returns the model, or the model
            and an example of its inputs.
        inputs: shapes such as ``"1x3x224x224"`` or ``"1x16:int64"``, one for each input, instead of the example.
        part: which part the model's state is.

    Returns:
        The manifest, and how the file was checked, in words.

    Raises:
        ConfigError: the function, the inputs, or a model that torch cannot export.
        ConflictError: the file exists.
        MismatchError: the checkpoint does not fit the model, or the file computes something else.
        MissingExtraError: ``pip install 'peakpoint[onnx]'``.
    """
    check_free(to)
    manifest = repository.find_manifest(ref)
    with needing("onnx", "export to ONNX needs"):
        importlib.import_module("onnxscript")
        onnx = importlib.import_module("onnx")
    model, example = _made(factory)
    arguments = tuple(map(_input, inputs)) or example
    if not arguments:
        raise ConfigError(f"{factory} gives no example of its inputs: give --input 1x3x224x224, once for each input")
    load(f"{manifest.run}/{manifest.name}", root=repository.store, into=model, part=part)
    size = sum(tensor.nbytes for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor))
    if size > _LARGEST:
        raise ConfigError(f"the model has {size} bytes, and an ONNX file holds no more than {_LARGEST}")
    model.eval()
    _try(model, arguments)
    with published(to) as temporary:
        _write(model, arguments, temporary)
        checked = _check(onnx, temporary, model, arguments, compare=size <= _SMALL)
    return manifest, checked


def _made(factory: str) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    function = load_function(factory)
    try:
        made = function()
    except (ImportError, *_OF_THE_USER) as error:
        raise ConfigError(f"--model {factory} gives no model: {type(error).__name__}: {error}") from error
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, ())
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"--model {factory} returns a {type(model).__name__}, and no torch.nn.Module")
    return model, example if isinstance(example, tuple) else (example,)


def _input(text: str) -> torch.Tensor:
    found = _INPUT.fullmatch(text)
    dtype = getattr(torch, found[2] or "float32", None) if found else None
    if found is None or not isinstance(dtype, torch.dtype):
        raise ConfigError(f"--input {text} is no shape; give 1x3x224x224 or 1x16:int64")
    shape = [int(size) for size in found[1].split("x")]
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _try(model: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
    """Run the model once: what is wrong with an input is said shortest by the model itself."""
    try:
        with torch.no_grad():
            model(*arguments)
    except _OF_THE_USER as error:
        shapes = ", ".join(str(list(one.shape)) for one in arguments if isinstance(one, torch.Tensor))
        raise ConfigError(f"the model does not compute this input, {shapes or arguments}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The innermost error in one line; torch's exporter wraps it in pages of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:500]}"


def _write(model: torch.nn.Module, arguments: tuple[Any, ...], path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it would say which packages it has not found
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            program = torch.onnx.export(model, arguments, dynamo=True, verbose=False)
        assert program is not None
        program.save(str(path), external_data=False)
    except _OF_THE_USER as error:
        raise ConfigError(f"torch cannot export this model to ONNX: {_cause(error)}") from error


def _check(onnx: Any, path: Path, model: torch.nn.Module, arguments: tuple[Any, ...], *, compare: bool) -> str:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise FormatError(f"torch wrote an ONNX file that onnx.checker refuses: {str(error)[:500]}") from error
    if not compare:
        return "checked by onnx.checker"
    reference = importlib.import_module("onnx.reference")
    with torch.no_grad():
        wanted = model(*arguments)
    wanted = [value.float().numpy() for value in (wanted if isinstance(wanted, tuple | list) else (wanted,))]
    try:
        evaluator = reference.ReferenceEvaluator(str(path))
        given = dict(zip(evaluator.input_names, (value.numpy() for value in arguments), strict=True))
        found = evaluator.run(None, given)
    except _OF_THE_USER as error:
        return f"checked by onnx.checker; the reference evaluator cannot run it ({type(error).__name__})"
    worst = 0.0
    for one, other in zip(wanted, found, strict=False):
        if one.shape != np.shape(other) or not np.allclose(one, other, rtol=1e-3, atol=1e-4):
            raise MismatchError("the ONNX file does not compute what the model does; it was not kept")
        worst = max(worst, float(np.max(np.abs(one - other), initial=0.0)))
    return f"checked by onnx.checker, and within {worst:.1g} of the model"
