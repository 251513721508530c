"""Ensembles: several checkpoints, each a model, whose predictions are averaged."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch

from peakpoint.errors import ConfigError, MismatchError
from peakpoint.models.average import find_all
from peakpoint.models.load import load
from peakpoint.models.mean import model_of
from peakpoint.repository.reader import hold_all
from peakpoint.repository.root import open_repository
from peakpoint.state.json_scalars import kind_of
from peakpoint.store import Store

Average = Literal["probabilities", "logits"]


class Ensemble(torch.nn.Module):
    """Models that predict together, made by ``peakpoint.ensemble``.

    The forward pass gives its arguments to every member and returns, for ``"probabilities"``, the logarithm of the mean
    of the members' probabilities (softmax over ``dim``), in single precision at least: what ``argmax`` and
    ``cross_entropy`` take like the logits of one model, and ``exp`` makes probabilities of. For ``"logits"`` it returns
    the mean of the members' outputs.

    Args:
        models: the members; each must return one tensor of logits, all of the same shape.
        average: ``"probabilities"`` or ``"logits"``.
        dim: the dimension of the classes.

    Attributes:
        refs: the checkpoints, as refs.

    Example:
        >>> models = [torch.nn.Identity(), torch.nn.Hardtanh()]
        >>> together = Ensemble(models, ["a", "b"])
        >>> together(torch.tensor([[0.0, 3.0]])).exp()  # of (0.0474, 0.9526) and (0.2689, 0.7311)
        tensor([[0.1582, 0.8418]])
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        refs: Sequence[str],
        *,
        average: Average = "probabilities",
        dim: int = -1,
    ) -> None:
        super().__init__()
        self.members = torch.nn.ModuleList(models)
        self.refs = tuple(refs)
        self._average, self._dim = average, dim

    @property
    def size_bytes(self) -> int:
        """Bytes of the parameters and buffers of all members."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def forward(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """Return what the members predict together; see the class.

        Raises:
            ConfigError: a member does not return one tensor.
            MismatchError: members return tensors of different shapes.
        """
        total: torch.Tensor | None = None
        for model, ref in zip(self.members, self.refs, strict=True):
            output: object = model(*arguments, **keywords)
            if not isinstance(output, torch.Tensor):
                raise ConfigError(f"{ref} returns a {kind_of(output)}: build_model() must make models of one output")
            if self._average == "probabilities":
                wide = output if output.dtype in (torch.float32, torch.float64) else output.float()
                output = torch.log_softmax(wide, self._dim)
            if total is None:
                total = output
                continue
            if output.shape != total.shape:
                raise MismatchError(
                    f"{ref} returns {list(output.shape)}, and {self.refs[0]} returns {list(total.shape)}: "
                    "outputs of different shapes have no mean"
                )
            total = torch.logaddexp(total, output) if self._average == "probabilities" else total + output
        assert total is not None
        count = torch.tensor(len(self.members), dtype=total.dtype, device=total.device)
        return total - count.log() if self._average == "probabilities" else total / count

    def extra_repr(self) -> str:
        """Return what ``print`` shows besides the members."""
        return f"{', '.join(self.refs)}; mean of {self._average}; {self.size_bytes:,} bytes"


def ensemble(
    refs: Sequence[str],
    build_model: Callable[[], torch.nn.Module],
    *,
    root: str | os.PathLike[str] | Store,
    part: str = "model",
    average: Average = "probabilities",
    dim: int = -1,
    device: torch.device | str | None = None,
) -> Ensemble:
    """Load checkpoints into models of their own, which predict together.

    Every byte is compared with its digest. Members are in evaluation mode. Memory and time of a prediction are those
    of as many models as there are refs; a soup (``peakpoint.soup``) has those of one.

    Args:
        refs: at least one; each names another checkpoint.
        build_model: makes a new model at each call; its values do not matter.
        average: ``"probabilities"`` or ``"logits"``; see ``Ensemble`` for what the forward pass returns.
        dim: the dimension of the classes in an output: -1 for ``[N, C]``, 1 for ``[N, C, H, W]``.

    Raises:
        ConfigError: no refs, one checkpoint twice, or a ``build_model`` that makes no new modules.
        NotFoundError: no such run, checkpoint or part.
        MismatchError: a checkpoint does not fit the model.
        CorruptError: a checkpoint is damaged; the message names the file and the tensor.

    Example:
        >>> import tempfile, torch, peakpoint as pp
        >>> root, model = tempfile.mkdtemp(), torch.nn.Linear(2, 3)
        >>> with pp.Checkpointer(root, run="r", state={"model": model}, keep=[pp.Last(2)]) as ckpt:
        ...     for epoch in ckpt.epochs(2):
        ...         _ = ckpt.report()
        >>> together = pp.ensemble(["r:epoch=0", "r:epoch=1"], lambda: torch.nn.Linear(2, 3), root=root)
        >>> inputs = torch.ones(5, 2)
        >>> torch.allclose(together(inputs), model(inputs).log_softmax(-1), atol=1e-6)
        True
    """
    if average not in get_args(Average):
        raise ConfigError(f"average={average!r}: give {' or '.join(map(repr, get_args(Average)))}")
    repository = open_repository(root)
    manifests = find_all(repository, refs, 1)
    models: list[torch.nn.Module] = []
    with hold_all(repository.store, manifests):
        for manifest in manifests:
            model = model_of(build_model, device)
            load(f"{manifest.run}/{manifest.id}", root=repository.store, into=model, part=part)
            models.append(model.eval())
            _check_apart(models)
    names = [f"{manifest.run}/{manifest.name}" for manifest in manifests]
    return Ensemble(models, names, average=average, dim=dim)


def _check_apart(models: Sequence[torch.nn.Module]) -> None:
    """Refuse models with common memory: the member that was loaded last would be all of them."""
    *earlier, new = models
    known_tensors = {id(tensor) for model in earlier for tensor in (*model.parameters(), *model.buffers())}
    tensors = (*new.parameters(), *new.buffers())
    if any(new is model for model in earlier) or any(id(tensor) in known_tensors for tensor in tensors):
        raise ConfigError("build_model() returns the same model, or parts of it, again; it must make a new one")
