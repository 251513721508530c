"""Bytes that a run leaves on the disk, and bytes that it writes: rules over checkpoints, and a file for each policy.

LeNet-5 on scikit-learn's digits (enlarged from 8 by 8 to 32 by 32), Adam, pruned by magnitude while it trains: after
each epoch the smallest weights are set to zero and stay there, up to a sparsity of 0.9 after four fifths of the epochs.
"""

import os
import shutil
import threading
from contextlib import ExitStack

import torch
from sklearn.metrics import f1_score
from torch import nn

import peakpoint as pp
from benchmarks.cases import frozen_resnet50
from benchmarks.page import LEAN, NAIVE, NAIVE_THIN, PACKED, THIN
from benchmarks.quiet import QuietCheckpointer
from peakpoint.cli.demo.training import TRAINING_IMAGES, LeNet5, digits
from peakpoint.repository import maintenance
from peakpoint.store import FileOps, LocalStore

EPOCHS, BATCH = 100, 64
SPARSITY = 0.9
METRICS = {"val_accuracy": "max", "val_f1": "max", "val_loss": "min"}
AT, TARGETS, TOLERANCE = "val_accuracy", (0.5, 0.7, 0.9), 0.01
EVERY, LAST = 10, 3
KEPT = 10  # checkpoints of the fine-tuning


def rules(parts=None, *, lean=False):
    """The preset for one metric, the best of the others, the best at each sparsity.

    Lean: of the last ones only the newest, from which the run continues, keeps more than its weights.
    """
    (metric, mode), *others = METRICS.items()
    preset = pp.rules.research(metric, mode, parts=parts)
    if lean:
        preset = [*preset[:-1], pp.Last(LAST, parts=parts), pp.Last(1)]
    return [
        *preset,
        *(pp.Best(name, direction, parts=parts) for name, direction in others),
        pp.BestAtSparsity(AT, METRICS[AT], TARGETS, TOLERANCE, parts=parts),
    ]


def policies():
    """Names of the policies, by the text of the rule that is the same."""
    best = {f"best:{metric}:{mode}": f"best_{metric}" for metric, mode in METRICS.items()}
    at = pp.BestAtSparsity(AT, METRICS[AT], TARGETS, TOLERANCE)
    return {**best, f"every:{EVERY}ep": "epoch", f"last:{LAST}": "last", at.text: "best_at"}


class Training:
    """One training; ``epochs`` yields the metrics of each epoch when it is complete."""

    def __init__(self, seed, epochs, images):
        torch.manual_seed(seed)
        self.epochs, self.images = epochs, min(images, TRAINING_IMAGES)
        pictures, labels = digits()
        order = torch.randperm(len(pictures))
        self.pictures, self.labels = pictures[order], labels[order]
        self.model = LeNet5()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.weights = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        self.masks = [torch.ones_like(weight, dtype=torch.bool) for weight in self.weights]

    def __iter__(self):
        loss = nn.CrossEntropyLoss()
        for epoch in range(self.epochs):
            self.model.train()
            for batch in torch.randperm(self.images).split(BATCH):
                value = loss(self.model(self.pictures[batch]), self.labels[batch])
                self.optimizer.zero_grad()
                value.backward()
                self.optimizer.step()
                self.apply_masks()
            self.prune(min(1.0, (epoch + 1) / (0.8 * self.epochs)) * SPARSITY)
            self.model.eval()
            with torch.no_grad():
                scores = self.model(self.pictures[TRAINING_IMAGES:])
            expected = self.labels[TRAINING_IMAGES:]
            yield {
                "val_accuracy": (scores.argmax(1) == expected).float().mean().item(),
                "val_loss": loss(scores, expected).item(),
                "val_f1": f1_score(expected, scores.argmax(1), average="macro"),
                "sparsity": self.sparsity(),
            }

    def apply_masks(self):
        """What was pruned stays zero."""
        with torch.no_grad():
            for weight, mask in zip(self.weights, self.masks, strict=True):
                weight.mul_(mask)

    def prune(self, sparsity):
        """Set the smallest weights of all layers to zero."""
        sizes = torch.cat([weight.detach().abs().flatten() for weight in self.weights])
        least = sizes.sort().values[min(int(sparsity * len(sizes)), len(sizes) - 1)]
        self.masks = [weight.detach().abs() >= least for weight in self.weights]
        self.apply_masks()

    def sparsity(self):
        """Zeros among the weights."""
        return sum((weight == 0).sum().item() for weight in self.weights) / sum(w.numel() for w in self.weights)


class Counting(FileOps):
    """System calls that count the bytes that are written."""

    def __init__(self):
        self.written = 0
        self._lock = threading.Lock()

    def write(self, fd, data):
        """Write and count."""
        done = super().write(fd, data)
        with self._lock:
            self.written += done
        return done


class Ours:
    """One repository under the rules."""

    def __init__(self, place, training, chosen):
        self.place, self.ops = place, Counting()
        state = {"model": training.model, "optimizer": training.optimizer}
        store = LocalStore(place, self.ops)
        self.ckpt = QuietCheckpointer(store, run="lenet5", state=state, keep=chosen)
        self.ckpt.resume()

    def report(self, epoch, metrics):
        """The rules decide."""
        self.ckpt.report(metrics, epoch=epoch)

    def close(self):
        """Wait for the last save."""
        self.ckpt.close()

    @property
    def written(self):
        """Bytes so far."""
        return self.ops.written

    def kept(self):
        """The epochs of each policy."""
        run = pp.open(self.place).run("lenet5")
        epochs = {checkpoint.id: checkpoint.epoch for checkpoint in run.checkpoints()}
        named = policies()
        found = {name: set() for name in named.values()}
        for checkpoint, claims in run.kept().items():
            for claim in claims:
                rule = claim.rule.removesuffix(":parts=model")
                if rule in named:
                    found[named[rule]].add(epochs[checkpoint])
        return found


class Files:
    """What scripts do: every policy has files of its own, with the whole state in each or only in the last ones."""

    def __init__(self, place, training, *, thin):
        self.place, self.training, self.thin = place, training, thin
        self.best, self.written = {}, 0
        place.mkdir()

    def _save(self, name, epoch, metrics):
        state = {"model": self.training.model.state_dict(), "epoch": epoch, "metrics": metrics}
        if not self.thin or name.startswith("last"):
            state["optimizer"] = self.training.optimizer.state_dict()
        path = self.place / f"{name}.pt"
        torch.save(state, path)
        self.written += path.stat().st_size

    def _save_best(self, name, value, mode, epoch, metrics):
        better = name not in self.best or (value > self.best[name] if mode == "max" else value < self.best[name])
        if better:
            self.best[name] = value
            self._save(name, epoch, metrics)

    def report(self, epoch, metrics):
        """One policy after the other."""
        for metric, mode in METRICS.items():
            self._save_best(f"best_{metric}", metrics[metric], mode, epoch, metrics)
        target = min(TARGETS, key=lambda target: abs(target - metrics["sparsity"]))
        if abs(target - metrics["sparsity"]) <= TOLERANCE:
            self._save_best(f"best_at-{target}", metrics[AT], METRICS[AT], epoch, metrics)
        if (epoch + 1) % EVERY == 0:
            self._save(f"epoch-{epoch}", epoch, metrics)
        self._save(f"last-{epoch}", epoch, metrics)
        (self.place / f"last-{epoch - LAST}.pt").unlink(missing_ok=True)

    def close(self):
        """Nothing is under way."""

    def kept(self):
        """The epochs of each policy, as the files have them."""
        found = {name: set() for name in policies().values()}
        for path in self.place.iterdir():
            found[path.stem.partition("-")[0]].add(torch.load(path, weights_only=True)["epoch"])
        return found


def on_disk(place):
    """What ``du`` says: allocated bytes of files and directories, hard links counted once."""
    os.sync()  # some file systems allocate late
    found = {}
    for path in [place, *place.rglob("*")]:
        status = path.lstat()
        found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def compare(place, seed, epochs, images, progress=lambda: None):
    """One training, kept by all sides at once: what each of them kept, and the bytes."""
    place.mkdir()
    training = Training(seed, epochs, images)
    with ExitStack() as stack:
        sides = {
            "peakpoint": Ours(place / "plain", training, rules()),
            THIN: Ours(place / "thin", training, rules("model")),
            LEAN: Ours(place / "lean", training, rules("model", lean=True)),
            NAIVE: Files(place / "files", training, thin=False),
            NAIVE_THIN: Files(place / "thin-files", training, thin=True),
        }
        for side in sides.values():
            stack.callback(side.close)
        for epoch, metrics in enumerate(training):
            for side in sides.values():
                side.report(epoch, metrics)
            progress()
    kept = [side.kept() for side in sides.values()]
    assert all(one == kept[0] for one in kept), f"the sides must keep the same: {kept}"
    found = {name: {"bytes": on_disk(side.place), "written": side.written} for name, side in sides.items()}
    lean = sides[LEAN]
    packed = maintenance.archive(pp.open(lean.place).run("lenet5"))
    written = lean.written + sum(one.packed_bytes for one in packed)
    found[PACKED] = {"bytes": on_disk(lean.place), "written": written}
    shutil.rmtree(place)
    return {
        "seed": seed,
        "last_metrics": metrics,
        "kept": {policy: sorted(epochs) for policy, epochs in kept[0].items()},
        "sides": found,
    }


def fine_tune(place, scale):
    """Checkpoints of a model with a frozen backbone: bytes on the disk, and those that cannot be less."""
    place.mkdir()
    case = frozen_resnet50(scale)
    own = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    backbone = sum(parameter.nbytes for parameter in case.model.parameters() if not parameter.requires_grad)
    (place / "files").mkdir()
    with QuietCheckpointer(place / "ours", run="r", state=case.state, keep=[pp.Last(KEPT)]) as ckpt:
        for step in range(1, KEPT + 1):
            for parameter in own:
                parameter.grad = torch.randn_like(parameter)
            case.optimizer.step()
            ckpt.report(step=step)
            torch.save(case.state_dict(), place / "files" / f"{step}.pt")
    found = {
        "case": case.name,
        "checkpoints": KEPT,
        "backbone": backbone,
        "changed": case.bytes - backbone,
        "bytes": on_disk(place / "ours"),
        "files": on_disk(place / "files"),
    }
    shutil.rmtree(place)
    return found


def measure(place, scale, seeds, progress):
    """Bytes of several trainings, and of a fine-tuning."""
    epochs, images = (EPOCHS, TRAINING_IMAGES) if scale == 1 else (40, BATCH)
    place.mkdir()
    runs = [compare(place / str(seed), seed, epochs, images, progress) for seed in range(seeds)]
    found = {"epochs": epochs, "runs": runs, "fine_tuning": fine_tune(place / "f", scale)}
    shutil.rmtree(place)
    return found
