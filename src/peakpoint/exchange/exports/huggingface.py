"""Export to a folder of Hugging Face's form: weights, an index of shards, config, history of metrics."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from peakpoint.errors import FormatError
from peakpoint.exchange.exports.files import check_free, default_part, published
from peakpoint.exchange.exports.weights import AS_SAVED, WeightOptions, WeightStream, weight_stream
from peakpoint.format.amounts import read_bytes
from peakpoint.format.manifest import Manifest
from peakpoint.format.metrics import metrics_to_json
from peakpoint.reports import card
from peakpoint.repository.reader import hold_all
from peakpoint.repository.root import Repository
from peakpoint.rules.history import history
from peakpoint.state.saved import SavedState, check_part_of, read_state
from peakpoint.state.tensor_files import lay_out
from peakpoint.store import translated


def export_folder(
    repository: Repository,
    ref: str,
    to: Path,
    part: str = "",
    *,
    shard: int | str = "5 GB",
    config: Path | None = None,
    options: WeightOptions = AS_SAVED,
) -> Manifest:
    """Write one part of a checkpoint to a folder of its own; atomic and durable.

    The folder has ``model.safetensors``, or shards with ``model.safetensors.index.json``; ``config.json`` when one is
    passed or was imported with the checkpoint; ``trainer_state.json`` with the metrics of the checkpoint's history; and
    the model card, ``README.md``.

    Args:
        to: the folder; must not exist.
        part: which part; by default ``model``, or the only part with tensors.
        shard: the most bytes of tensors in one file; one tensor may be larger.
        config: a JSON file to become ``config.json``.
        options: how the weights are written.

    Returns:
        The manifest of the checkpoint.

    Raises:
        ConfigError: the part is not a dict of tensors, or the size is not a number of bytes.
        ConflictError: the folder exists.
        NotFoundError: no such checkpoint, part or file.
        CorruptError: the checkpoint is damaged.
    """
    max_bytes = read_bytes("shard", shard)
    check_free(to)
    settings = None if config is None else _read_config(config)
    manifest = repository.find_manifest(ref)
    part = part or default_part(manifest)
    check_part_of(manifest, part)
    config_parts = [name for name in ("config", "extra") if name in manifest.parts]
    with hold_all(repository.store, [manifest]):
        saved = read_state(repository.store, manifest, config_parts)
        weights = weight_stream(repository.store, manifest, saved.trees, part, options)
        settings = _stored_config(saved, config_parts) if settings is None else settings
        state, page = _trainer_state(repository, manifest), card.markdown(card.gather(repository, ref))
        with published(to) as folder:
            folder.mkdir()
            (folder / card.PAGE).write_text(page, encoding="utf-8")
            _write_json(folder / "trainer_state.json", state)
            if settings is not None:
                _write_json(folder / "config.json", settings)
            _write_weights(folder, weights, max_bytes)
    return manifest


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_weights(folder: Path, weights: WeightStream, max_bytes: int) -> None:
    shards = list(_shards(weights.kinds, max_bytes))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
        total = sum(tensor.nbytes for tensor in weights.kinds.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
    for name, tensors in zip(names, shards, strict=True):
        layout = lay_out(name, tensors)
        with (folder / name).open("wb") as file:
            weights.write(file, layout.header, layout.spans)


def _shards(weights: Mapping[str, torch.Tensor], max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield tensors in their order, in groups of at most ``max_bytes``."""
    group: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights.items():
        if group and size + tensor.nbytes > max_bytes:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group


def _read_config(path: Path) -> Any:
    try:
        with translated("read", path):
            config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} does not hold a JSON object")
    return config


def _stored_config(saved: SavedState, parts: list[str]) -> Any:
    """Return the first config in the state that is JSON, or None."""
    for name in parts:
        value = saved.value(name)
        value = value.get("config") if name == "extra" and isinstance(value, dict) else value
        if isinstance(value, dict):
            try:
                return json.loads(json.dumps(value))
            except (TypeError, ValueError):
                continue
    return None


def _trainer_state(repository: Repository, manifest: Manifest) -> dict[str, Any]:
    """Return what transformers' ``TrainerState`` reads; epochs are those completed."""
    events = repository.run(manifest.run).events()
    log = []
    for report in history(events, manifest.id):
        epoch = {} if report.epoch is None else {"epoch": report.epoch + 1.0}
        log.append({**metrics_to_json(report.metrics), "step": report.step, **epoch})
    completed = None if manifest.epoch is None else manifest.epoch + 1.0
    return {"global_step": manifest.step, "epoch": completed, "log_history": log}
