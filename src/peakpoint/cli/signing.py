"""Commands about signatures: sign, verify."""

from pathlib import Path

import click

from peakpoint.cli import render
from peakpoint.cli.arguments import JSON, REF, ROOT
from peakpoint.cli.space import progress
from peakpoint.repository import signing
from peakpoint.repository.root import open_repository


@click.command()
@ROOT
@REF
@click.option("--key", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The private key, PEM.")
@JSON
def sign(root: Path, ref: str, key: Path, json: bool) -> None:  # noqa: FBT001
    """Sign a checkpoint: its manifest and every file of it, after comparing each byte with its digest.

    The password of an encrypted key is taken from PEAKPOINT_SIGNING_PASSWORD.
    """
    repository = open_repository(root)
    manifest = repository.find_manifest(ref)
    with progress("signing", manifest.size_bytes) as advance:
        made = signing.sign(repository.store, manifest, private_key=key, progress=advance)
    name = f"{manifest.run}/{manifest.name}"
    if json:
        render.as_json({"ref": name, "id": manifest.id, "record": made.record, "fingerprint": made.fingerprint})
        return
    click.echo(f"signed {name}: {made.record} covers {render.count(len(manifest.files) + 1, 'file')}")
    click.echo(f"key {made.fingerprint}")


@click.command()
@ROOT
@REF
@click.option("--key", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The public key, PEM.")
@JSON
def verify(root: Path, ref: str, key: Path, json: bool) -> None:  # noqa: FBT001
    """Verify that the owner of a key has signed a checkpoint as it is now. Exits with 15 when that is not so."""
    repository = open_repository(root)
    manifest = repository.find_manifest(ref)
    with progress("verifying", manifest.size_bytes) as advance:
        found = signing.verify(repository.store, manifest, public_key=key, progress=advance)
    name = f"{manifest.run}/{manifest.name}"
    if json:
        facts = {"record": found.record, "fingerprint": found.fingerprint, "files": found.files}
        render.as_json({"ref": name, "id": manifest.id, **facts})
        return
    click.echo(f"{name} is what was signed: {found.record}, {render.count(len(found.files), 'file')} compared")
    click.echo(f"key {found.fingerprint}")


COMMANDS = (sign, verify)
