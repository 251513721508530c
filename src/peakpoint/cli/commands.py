"""The commands, grouped by what a person wants to do. A new command is one line here and one function."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CommandEntry:
    """A command: its name, its line in ``peakpoint --help``, and ``module:function`` below ``peakpoint.cli``."""

    name: str
    help: str
    function: str


GROUPS = {
    "Train and look": (
        CommandEntry("demo", "Train, kill in the middle of a save, resume: nothing is lost", "demo.command:demo"),
        CommandEntry("ls", "List runs, or the checkpoints of a run and why each is kept", "runs:ls"),
        CommandEntry("show", "Show one checkpoint: metrics, files, digests, validations", "checkpoints:show"),
        CommandEntry("report", "Report runs: best against last, optimizers, sparsity", "report:report"),
        CommandEntry("plan", "Predict what a run will write and keep", "plan:plan"),
    ),
    "Choose and compare": (
        CommandEntry("select", "Find checkpoints of all runs by their metrics", "select:select"),
        CommandEntry("diff", "Compare two checkpoints, tensor by tensor", "weights:diff"),
        CommandEntry("record", "Add a metric that was measured after the save", "keep:record"),
        CommandEntry("soup", "Average the weights of several checkpoints", "weights:soup"),
    ),
    "Keep and clean": (
        CommandEntry("keep", "Show or change what the rules of a run keep", "keep:keep"),
        CommandEntry("explain", "Say why a checkpoint is kept, or why it was removed", "checkpoints:explain"),
        CommandEntry("pin", "Protect a checkpoint from the rules", "keep:pin"),
        CommandEntry("unpin", "Remove the pin of a checkpoint", "keep:unpin"),
        CommandEntry("rm", "Remove checkpoints", "space:rm"),
        CommandEntry("rename", "Give a run another name", "runs:rename"),
        CommandEntry("undo", "List, restore or empty the trash", "space:undo"),
        CommandEntry("archive", "Compress a finished run without loss, or restore it", "space:archive"),
        CommandEntry("audit", "Find damage and incomplete saves", "space:audit"),
    ),
    "Production": (
        CommandEntry("validate", "Check a checkpoint before it is deployed", "records:validate"),
        CommandEntry("promote", "Point an alias such as champion at a checkpoint", "promotion:promote"),
        CommandEntry("rollback", "Point an alias back at an earlier checkpoint", "promotion:rollback"),
        CommandEntry("release", "Select, validate, compare and promote by production.toml", "release:release"),
        CommandEntry("history", "List the aliases, or the history of one", "records:history"),
        CommandEntry("sign", "Sign a checkpoint, or verify its signature", "records:sign"),
        CommandEntry("changelog", "List everything that was done, promotions first", "report:changelog"),
    ),
    "Exchange": (
        CommandEntry("import", "Import checkpoints of other tools into a run", "exchange:import_"),
        CommandEntry("export", "Export a checkpoint to a file, a folder or a model card", "exchange:export"),
    ),
}
ENTRIES = {entry.name: entry for entries in GROUPS.values() for entry in entries}

RENAMED = {
    "aliases": "history ROOT",
    "card": "export ROOT REF --as card",
    "restore": "archive ROOT RUN --restore",
    "retire": "promote ROOT --retire ALIAS --why TEXT",
    "tell": "promote ROOT --notify ALIAS",
    "trash": "undo ROOT --list (or --empty)",
    "verify": "sign ROOT REF --verify --key FILE",
}
