"""A checkpointer that prints nothing and watches no signals, for measurements."""

from typing import Any

import peakpoint as pp


class QuietCheckpointer(pp.Checkpointer):
    _announce = staticmethod(str)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, preempt=None, **options)
