"""What a file system lacks, said once."""

from pathlib import Path

NO_DIRECT_IO = "refuses direct I/O, so saves go through the page cache, which is slower"
NO_DIRECTORY_SYNC = (
    "does not make directories durable, so a power cut may take back what was saved shortly before it; a kill takes "
    "back nothing"
)
NO_HARD_LINKS = (
    "has no hard links, so files that did not change are written again with every checkpoint, and of two processes "
    "that set one alias at the same moment, one may be overwritten"
)
NO_LOCKS = (
    "has no file locks, so of two processes that write one run, only those on one machine are kept apart for certain, "
    "and rules may remove a checkpoint that is being read; mount it with locks (NFS: lockd, Lustre: -o flock), or "
    "write each run from one machine only"
)


class Remarks:
    """Sentences about the file system of a store, each given out once.

    Args:
        root: of the store.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._is_given_out: dict[str, bool] = {}

    def add(self, lack: str) -> None:
        """Note what the file system lacks; one of the sentences above."""
        self._is_given_out.setdefault(f"{self._root}: this file system {lack}", False)

    def take(self) -> list[str]:
        """Give out the sentences that have not been given out."""
        sentences = [sentence for sentence, is_given_out in list(self._is_given_out.items()) if not is_given_out]
        self._is_given_out |= dict.fromkeys(sentences, True)
        return sentences
