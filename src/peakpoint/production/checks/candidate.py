"""The candidate that every check gets, and what a check returns."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from peakpoint.errors import ConfigError, FormatError, MismatchError
from peakpoint.format.manifest import Manifest
from peakpoint.production.checks.memory import MemoryPeak
from peakpoint.production.comparison import known_of
from peakpoint.production.validation import ValidationRequest, file_digest
from peakpoint.repository.validations import Finding, Predictions
from peakpoint.state.functions import MisnamedError, load_function
from peakpoint.state.restore import make_model, restore_into
from peakpoint.state.saved import Loaded, read_state, read_trees
from peakpoint.state.tensor_files import read_safetensors

Outputs = dict[str, torch.Tensor]
Function = Callable[..., Any] | str
"""A function, or ``module:function``, which is imported by the check that needs it."""
_BATCH = 256  # golden inputs in one forward pass


def passed(summary: str, **evidence: Any) -> Finding:
    """The finding of a check that passed; the runner adds the name of the check."""
    return Finding(check="", outcome="passed", said=summary, evidence=evidence)


def failed(summary: str, **evidence: Any) -> Finding:
    """The finding of a check that failed."""
    return Finding(check="", outcome="failed", said=summary, evidence=evidence)


def skipped(summary: str, **evidence: Any) -> Finding:
    """The finding of a check that had nothing to check."""
    return Finding(check="", outcome="skipped", said=summary, evidence=evidence)


@dataclass(frozen=True, slots=True)
class Golden:
    """Inputs whose outputs are compared.

    Attributes:
        inputs: any numbers, [n, ...].
        labels: int64 [n], the right classes; None when the file has none.
    """

    inputs: torch.Tensor
    labels: torch.Tensor | None


@dataclass(kw_only=True)
class Candidate(ValidationRequest):
    """A checkpoint that is being validated: what every check gets.

    A check is a function of one ``Candidate``. One of your own passes when it returns nothing, or a mapping of
    evidence; whatever it raises fails it.

    Attributes:
        state: as ``peakpoint.load`` returns it; each part is read when it is used.
        model: the model with its weights, in ``eval`` mode; None when no function was given that makes it.
        manifest: of the checkpoint.
        recorded: all metrics that are recorded of it.
        evaluated: the metrics that this validation has evaluated.
        repository: where it is.
        evaluate: evaluates the state.
        build_model: makes the model.
        checks: checks of the user.
        example: an example of the model's inputs, when the function that makes the model gave one.
        memory: what loading and running the model took; None when that was not asked for, or could not be done.
        not_run: why the model could not be run.
        predictions: of the evaluation, or on golden inputs.
        facts: what checks have found out beside their findings, for the record; the runner takes them away.
    """

    evaluate: Function | None
    build_model: Function | None
    checks: Sequence[Function]
    recorded: Mapping[str, float] = field(default_factory=dict)
    model: Any = None
    example: Any = None
    memory: MemoryPeak | None = None
    not_run: str = ""
    evaluated: Mapping[str, float] = field(default_factory=dict)
    predictions: Predictions | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recorded = known_of(self.repository.run(self.manifest.run), self.manifest)

    def check_functions(self) -> None:
        """Import every function of the user, and compare its arguments with those that it will get.

        Raises:
            ConfigError: there is no such function, or it takes other arguments.
        """
        if self.evaluate is not None:
            _check_callable(self.evaluate, "--with", "state")
        if self.build_model is not None:
            _check_callable(self.build_model, "--model")
        for check in self.checks:
            _check_callable(check, "--check", "candidate")

    @cached_property
    def state(self) -> Loaded:
        """The state of the checkpoint; each part is read when it is used."""
        store = self.repository.store
        return Loaded(self.manifest, store, read_trees(store, self.manifest), True)  # noqa: FBT003 - verify

    @cached_property
    def golden(self) -> Golden | None:
        """The golden inputs, from a safetensors file with ``inputs`` [n, ...] and maybe ``labels`` [n].

        Raises:
            FormatError: it is not such a file, or has changed meanwhile.
        """
        if self.wanted.golden is None:
            return None
        path = Path(self.wanted.golden)
        if self.wanted.golden_digest not in (None, file_digest(path)):
            raise FormatError(f"{path} has changed since the validation began")
        tensors = read_safetensors(path)[0]
        inputs, labels = tensors.get("inputs"), tensors.get("labels")
        if inputs is None:
            raise FormatError(f"{path} has no tensor 'inputs'. Tensors: {', '.join(sorted(tensors)) or 'none'}")
        if inputs.dim() == 0 or not len(inputs):
            raise FormatError(f"{path}: inputs has the shape {list(inputs.shape)}; give [n, ...] with n of at least 1")
        if labels is not None and (labels.shape != inputs.shape[:1] or is_floating(labels)):
            raise FormatError(
                f"{path}: labels is {labels.dtype} {list(labels.shape)}; give integers of the shape {[len(inputs)]}"
            )
        return Golden(inputs, None if labels is None else labels.long())

    @cached_property
    def outputs(self) -> Outputs:
        """The outputs of the model for the golden inputs."""
        assert self.golden is not None
        return outputs_of(self.model, self.golden.inputs)

    def keep_predictions(self, predictions: Predictions) -> None:
        """Have predictions stored beside the record."""
        self.predictions = self.facts["predictions"] = predictions

    def new_model(self) -> tuple[Any, Any]:
        """A model as the function of the user makes it, and an example of its inputs, or None.

        Raises:
            ConfigError: it makes no model.
        """
        assert self.build_model is not None
        return make_model(function_of(self.build_model), str(self.wanted.model))

    def load_weights(self, model: Any, manifest: Manifest) -> str:
        """Load a checkpoint's weights into a model, strictly; returns how much, in words.

        Raises:
            MismatchError: names, shapes or dtypes differ; lists them.
        """
        part = self.wanted.part
        saved = read_state(self.repository.store, manifest, [part])
        report = restore_into(saved, {part: model}, strict=True, exhaustive=False)
        if isinstance(model, torch.nn.Module):
            model.eval()
        return report.restored[0].what


def _check_callable(function: Function, option: str, *arguments: str) -> None:
    """Refuse a function that cannot be called with these arguments, as far as can be seen without calling it."""
    try:
        signature = inspect.signature(function_of(function))
    except MisnamedError as error:
        raise ConfigError(f"{option} {error}") from error
    except (TypeError, ValueError):  # of one in C that does not tell
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        call = f"with one argument, the {arguments[0]}" if arguments else "without arguments"
        raise ConfigError(f"{option} {function}: it is called {call}: {error}") from error


def function_of(function: Function) -> Callable[..., Any]:
    """Return a function, imported if it is named."""
    return load_function(function) if isinstance(function, str) else function


def is_floating(tensor: torch.Tensor) -> bool:
    """Whether a tensor has floating-point or complex elements."""
    return tensor.is_floating_point() or tensor.is_complex()


# --- running a model ----------------------------------------------------------------------------------------------


def device_of(model: Any) -> torch.device:
    """The device of a model."""
    if isinstance(model, torch.nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


def outputs_of(model: Any, inputs: torch.Tensor) -> Outputs:
    """Run a model on inputs, batch by batch: every output with a row for each input, by name, on the CPU.

    Raises:
        MismatchError: it returns no such tensor.
    """
    device = device_of(model)
    batches = []
    for batch in torch.split(inputs, _BATCH):
        with torch.no_grad():
            outputs = named_tensors(model(batch.to(device)))
        rows = {
            name: output.detach().cpu()
            for name, output in outputs.items()
            if output.dim() and len(output) == len(batch)
        }
        if not rows:
            shapes = ", ".join(f"{name} {list(output.shape)}" for name, output in outputs.items()) or "no tensor"
            raise MismatchError(f"the model returns {shapes} for {len(batch)} inputs: no tensor with a row for each")
        batches.append(rows)
    # an output that is as long as this batch by chance is not as long as the next
    names = [name for name in batches[0] if all(name in rows for rows in batches)]
    if not names:
        raise MismatchError(f"the model returns no tensor with a row for each of {len(inputs)} inputs")
    return {name: torch.cat([rows[name] for rows in batches]) for name in names}


def named_tensors(output: Any, name: str = "") -> Outputs:
    """The tensors in what a model returns: ``output`` when it is one, else by their keys or numbers."""
    if isinstance(output, torch.Tensor):
        return {name or "output": output}
    outputs: Outputs = {}
    if isinstance(output, list | tuple):
        output = dict(enumerate(output))
    pairs = output.items() if isinstance(output, Mapping) else ()
    for key, value in pairs:
        outputs |= named_tensors(value, f"{name}.{key}" if name else str(key))
    return outputs


def classes_of(outputs: Outputs) -> torch.Tensor | None:
    """The classes that the first output predicts, int64 [n]; None when it predicts none.

    Integers [n] are classes; of floating-point scores [n, classes] with two classes or more, the highest wins.
    """
    first = next(iter(outputs.values()))
    if first.dim() == 1 and not is_floating(first):
        return first.long()
    if first.dim() == 2 and first.shape[1] >= 2 and first.is_floating_point():
        return first.float().argmax(1) if first.dtype.itemsize < 4 else first.argmax(1)
    return None
