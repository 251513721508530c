"""The command ``export``: a checkpoint as a file, a folder, or a model card."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from peakpoint.cli.answer import Answer, answers
from peakpoint.cli.arguments import PATH, REF, ROOT, torch_side
from peakpoint.cli.render import ref
from peakpoint.errors import ConfigError
from peakpoint.format.amounts import size_text
from peakpoint.reports import card as cards
from peakpoint.reports.card.front_matter import front_matter
from peakpoint.repository.root import Repository, open_repository

_OPTIONS = {  # of one form only
    "hf": ("shard", "config"),
    "card": ("license", "data", "task", "base_model", "tags", "about", "force"),
}


@click.command()
@ROOT
@REF
@click.option("--to", type=PATH, help="FILE.safetensors, .pth, .pt or DIR.")
@click.option("--as", "form", type=click.Choice(["hf", "card"]), help="A folder for Hugging Face, or a model card.")
@click.option("--part", "parts", multiple=True, help="Which part, may be repeated for .pth; model by default.")
@click.option("--shard", default="5 GB", help="hf: the most bytes of one file.")
@click.option("--config", type=PATH, help="hf: becomes config.json.")
@click.option("--license", metavar="ID", help="card: such as apache-2.0.")
@click.option("--data", metavar="TEXT", help="card: what the model was trained and evaluated on.")
@click.option("--task", metavar="ID", help="card: such as image-classification.")
@click.option("--base-model", metavar="ID", help="card: the model on the Hub that it was made of.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="card: a further tag; may be repeated.")
@click.option("--about", type=PATH, metavar="FILE.md", help="card: text of yours that is put in.")
@click.option("--force", is_flag=True, help="card: replace files that are not an earlier card, too.")
@answers
def export(root: Path, ref: str, to: Path | None, form: str | None, **options: Any) -> Answer:
    """Export a checkpoint to a file or folder that other tools open, or write its model card.

    A card goes into DIR as README.md, with curve.png; without --to it is printed.
    """
    _refuse_options_of_other_forms(form)
    repository = open_repository(root)
    if form == "card":
        return _card(repository, ref, to, **options)
    if to is None:
        raise ConfigError("--to names no file or folder; give FILE.safetensors, FILE.pth, FILE.pt or DIR")
    return _export(repository, ref, to, form, **options)


def _refuse_options_of_other_forms(form: str | None) -> None:
    context = click.get_current_context()
    for owner, names in _OPTIONS.items():
        for option in context.command.params:
            given = context.get_parameter_source(option.name or "") is not ParameterSource.DEFAULT
            if form != owner and option.name in names and given:
                raise ConfigError(f"{option.opts[-1]} is for --as {owner}; add it, or leave {option.opts[-1]} out")


def _export(
    repository: Repository,
    text: str,
    to: Path,
    form: str | None,
    *,
    parts: tuple[str, ...],
    shard: str,
    config: Path | None,
    **_: Any,
) -> Answer:
    if form == "hf":
        folders = torch_side("peakpoint.exchange.exports.huggingface")
        manifest = folders.export_folder(repository, text, to, parts[0] if parts else "", shard=shard, config=config)
    else:
        manifest = torch_side("peakpoint.exchange.exports.files").export(repository, text, to, parts)
    size_bytes = to.stat().st_size if to.is_file() else sum(file.stat().st_size for file in to.iterdir())
    data = {"ref": ref(manifest), "to": str(to), "size_bytes": size_bytes}
    return Answer(data, f"{ref(manifest)} -> {to} ({size_text(size_bytes)})")


def _card(
    repository: Repository, text: str, to: Path | None, *, about: Path | None, force: bool, **options: Any
) -> Answer:
    names = ("license", "data", "task", "base_model", "tags")
    description = cards.ModelDescription(
        about="" if about is None else cards.about_text(about), **{name: options[name] for name in names}
    )
    card = cards.gather(repository, text, description)
    files = [] if to is None else cards.write(card, to, force=force)
    page = cards.markdown(card) if to is None else files[0].read_text(encoding="utf-8")
    data = {
        "ref": ref(card.manifest),
        "id": card.manifest.id,
        "front_matter": front_matter(card),
        "markdown": page,
        "files": list(map(str, files)),
    }
    if to is None:
        return Answer(data, page.removesuffix("\n"))
    lines = [f"wrote {file} ({size_text(file.stat().st_size)})" for file in files]
    if len(files) == 1:
        lines.append("no curve: no rule ranks by a metric that has values, or Matplotlib is missing")
    return Answer(data, "\n".join(lines))
