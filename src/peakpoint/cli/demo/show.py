"""The show of ``peakpoint demo``: trainings in processes of their own, and what they leave behind."""

import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import sklearn  # the demonstration's data; imported here so that its absence is said before anything runs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from peakpoint.cli.promotion import print_comparison
from peakpoint.cli.records import holder_name, verdict
from peakpoint.cli.render import console as make_console
from peakpoint.cli.render import literal
from peakpoint.cli.runs import print_run, view
from peakpoint.cli.space import audit_sentence
from peakpoint.errors import ConfigError, Error
from peakpoint.format.layout import REPOSITORY
from peakpoint.production import promotion, validation
from peakpoint.production.proposal import propose
from peakpoint.repository import audit
from peakpoint.repository.root import Repository, open_repository
from peakpoint.repository.validations import ValidationSpec
from peakpoint.rules import ranking_metrics
from peakpoint.rules.peaks import peaks

WHOLE, KILLED = "lenet5-uninterrupted", "lenet5-killed"
_TRAINING = "peakpoint.cli.demo.training"


class DemoError(Error):
    """The demonstration did not show what it promises."""


@dataclass(frozen=True, slots=True)
class Training:
    """The result of one process.

    Attributes:
        code: its exit code; negative for a signal.
        weights: digest of the final weights, "" when it did not get there.
        size: bytes of the final weights.
        accuracies: of each epoch that it ran.
        stderr: what it printed there.
    """

    code: int
    weights: str
    size: int
    accuracies: tuple[float, ...]
    stderr: str


def run(out: Path, epochs: int) -> None:
    """Run the demonstration in ``out``.

    Raises:
        ConfigError: ``out`` holds something else.
        DemoError: what was to be shown is not so.
    """
    console = make_console()
    _make_empty(console, out)
    console.print(f"LeNet-5 on the digits of scikit-learn {sklearn.__version__}, {epochs} epochs, on the CPU\n")
    save = max(2, epochs // 2)
    with _progress(console) as progress:
        whole = _train(progress, "1. without interruption", out, WHOLE, epochs)
        killed = _train(progress, f"2. killed in save {save}", out, KILLED, epochs, save)
        _expect(killed.code == -signal.SIGKILL, f"the second training was not killed: exit code {killed.code}")
        litter = [finding for finding in audit.audit(open_repository(out)).findings if finding.kind == "litter"]
        resumed = _train(progress, "3. the same command again", out, KILLED, epochs)
    repository = open_repository(out)
    console.print(
        f"\n[bold]The kill.[/] The second training got SIGKILL in the middle of save {save}, with half of "
        f"the optimizer written, after {len(killed.accuracies)} reported epochs. It left behind:"
    )
    for finding in litter:
        console.print(f"  {literal(finding.where)}: {finding.what}")
    _expect(litter, "the kill should have left an incomplete save, and left nothing")
    console.print("\n[bold]The resume.[/] The same command, run again, said:")
    console.print("\n".join(map(literal, resumed.stderr.strip().splitlines())))
    _expect("resumed from" in resumed.stderr, "the third training should have resumed, and did not")
    _show_weights(console, whole, resumed)
    print_run(console, view(repository.run(KILLED)))
    _show_best(console, repository)
    _show_production(console, repository)
    _show_next_commands(console, out)


def _make_empty(console: Console, out: Path) -> None:
    """Remove an earlier demonstration; refuse to touch anything else."""
    if not out.exists() or not any(out.iterdir()):
        return
    runs = {path.name for path in (out / "runs").glob("*")}
    if not (out / REPOSITORY).is_file() or not runs <= {WHOLE, KILLED}:
        raise ConfigError(f"{out} holds something that is not an earlier demonstration; choose another --out")
    console.print(f"Replacing the earlier demonstration in {literal(str(out))}.")
    shutil.rmtree(out)


def _progress(console: Console) -> Progress:
    description, note = TextColumn("{task.description:<28}"), TextColumn("{task.fields[note]}")
    return Progress(description, BarColumn(), MofNCompleteColumn(), note, TimeElapsedColumn(), console=console)


def _train(progress: Progress, title: str, root: Path, run: str, epochs: int, kill_at_save: int = 0) -> Training:
    task = progress.add_task(title, total=epochs, note="")
    command = [sys.executable, "-m", _TRAINING, str(root), run, str(epochs), str(kill_at_save)]
    accuracies: list[float] = []
    weights, size = "", 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            record = msgspec.json.decode(line)
            if "weights" in record:
                weights, size = record["weights"], record["bytes"]
                continue
            accuracies.append(record["val_accuracy"])
            progress.update(task, completed=record["epoch"] + 1, note=f"accuracy {record['val_accuracy']:.4f}")
        stderr = process.stderr.read()
    progress.stop_task(task)
    code = process.wait()
    if code == -signal.SIGKILL:
        progress.update(task, note="[bold red]SIGKILL[/]")
    _expect(code in (0, -signal.SIGKILL), f"a training ended with exit code {code}:\n{stderr}")
    return Training(code, weights, size, tuple(accuracies), stderr)


def _expect(holds: object, otherwise: str) -> None:
    if not holds:
        raise DemoError(otherwise)


def _show_weights(console: Console, whole: Training, resumed: Training) -> None:
    console.print("\n[bold]The final weights[/] (BLAKE3):")
    console.print(f"  never interrupted   {whole.weights}")
    console.print(f"  killed and resumed  {resumed.weights}")
    same = whole.weights == resumed.weights != ""
    _expect(same, "the final weights should be equal, and are not")
    console.print(f"  [bold green]equal, all {resumed.size} bytes[/]\n")
    best = max(whole.accuracies)
    _expect(best > 0.95, f"the accuracy should be above 0.95, and is {best:.4f}")


def _show_best(console: Console, repository: Repository) -> None:
    run = repository.run(KILLED)
    for peak in peaks(run.history(), ranking_metrics(run.rules())):
        checkpoint = run.best(peak.metric, mode=peak.mode)
        _expect(checkpoint.metrics[peak.metric] == peak.best, f"the best {peak.metric} was not kept")
        console.print(
            f"[bold]Best against last:[/] {peak.metric} {peak.best:.4f} at epoch {peak.best_epoch}, "
            f"{peak.last:.4f} at the end; the best is kept as {checkpoint.name}"
        )
    result = audit.audit(repository, deep=True)
    _expect(result.clean, "the repository should be clean at the end, and is not")
    console.print(f"\n[bold]Audit:[/] {audit_sentence(result)}; [green]clean[/]")


def _show_production(console: Console, repository: Repository) -> None:
    """Two checkpoints become champion one after the other, and the first comes back."""
    run = repository.run(KILLED)
    best = run.best("val_accuracy")
    checks = ValidationSpec(evaluate=f"{_TRAINING}:evaluate", model=f"{_TRAINING}:LeNet5")
    console.print("\n[bold]Production.[/] An early checkpoint is validated and promoted to champion; then the best is:")
    early = next((checkpoint for checkpoint in run.checkpoints() if checkpoint.id != best.id), best)
    for checkpoint in (early, best):
        result = validation.validate(repository, checkpoint.ref, checks)
        _expect(result.passed, f"{checkpoint.ref} should have passed its validation, and did not")
        proposal = propose(repository, checkpoint.ref, "champion")
        if proposal.comparison is not None:
            print_comparison(console, proposal.comparison)
        record = promotion.promote(proposal, "the demonstration")
        line = f"champion is {literal(checkpoint.name)} (record {record.number}); validation {verdict(result)}"
        console.print(f"  {line}", soft_wrap=True)
    if record.number > 1:
        record = promotion.rollback(repository, "champion", "to show that it goes back").record
        console.print(f"  Rolled back: champion is {literal(holder_name(record))} again, record {record.number}")


def _show_next_commands(console: Console, out: Path) -> None:
    program = "peakpoint" if shutil.which("peakpoint") else f"{shlex.quote(sys.executable)} -m peakpoint"
    place = shlex.quote(str(out))
    console.print("\nLook around:")
    for command in (
        f"{program} ls {place}",
        f"{program} show {place} {KILLED}@best:val_accuracy",
        f"{program} select {place} 'val_accuracy > 0.99' --max val_accuracy --min epoch --top 3 --why",
        f"{program} report {place} --to report.html",
        f"{program} export {place} {KILLED}@best:val_accuracy --to best.safetensors",
        f"{program} validate {place} {KILLED}@best:val_accuracy --with {_TRAINING}:evaluate --model {_TRAINING}:LeNet5",
        f"{program} promote {place} {KILLED}@best:val_accuracy --as champion --why 'it is the best'",
        f"{program} history {place} champion",
        f"{program} changelog {place}",
        f"{program} audit {place} --deep",
    ):
        console.print(f"  {literal(command)}", soft_wrap=True)
