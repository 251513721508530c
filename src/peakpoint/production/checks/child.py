"""The process apart that examines: see ``peakpoint.production.subprocess_runner``."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from peakpoint.production.checks.candidate import Exam
from peakpoint.production.checks.runner import examine
from peakpoint.production.subprocess_runner import Ends
from peakpoint.repository.root import open_repository
from peakpoint.repository.validations import ValidationSpec
from peakpoint.state.functions import load_function


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be examined.

    Attributes:
        root: directory of the repository.
        ref: the checkpoint.
        wanted: what is asked.
        alias: whose holder is the champion.
        champion: that checkpoint; None when there is none.
        without: then why.
    """

    root: str
    ref: str
    wanted: ValidationSpec
    alias: str
    champion: str | None
    without: str


def main(ends: list[Any]) -> None:
    """Examine, and say what was found, a line of JSON each.

    Args:
        ends: see ``peakpoint.production.subprocess_runner``.
    """
    pipes = Ends(ends)
    job = msgspec.json.decode(pipes.job(), type=Job)
    repository = open_repository(job.root)
    exam = Exam(
        repository=repository,
        manifest=repository.find_manifest(job.ref),
        wanted=job.wanted,
        alias=job.alias,
        champion=None if job.champion is None else repository.find_manifest(job.champion),
        without=job.without,
        evaluate=None if job.wanted.evaluate is None else partial(load_function, job.wanted.evaluate),
        make=None if job.wanted.model is None else partial(load_function, job.wanted.model),
        further=[partial(load_function, spec) for spec in job.wanted.checks],
    )
    for event in examine(exam):
        pipes.say(msgspec.json.encode(event))
