"""One of several processes that change an alias at once; prints what it was told has been done.

Arguments: a directory or the URL of a bucket, a name for this process, how many changes, the seed of faults or "".
"""

import sys
from datetime import UTC, datetime
from pathlib import Path

from object_store import Bucket, Faulty
from peakpoint.errors import ConflictError, TransientStoreError
from peakpoint.repository.aliases import AliasChange, AliasTarget, append, newest
from peakpoint.store import LocalStore

place, me, count, seed = sys.argv[1:]
where = Bucket(*place.rsplit("/", 1)) if "://" in place else LocalStore(Path(place))
store = Faulty(where, int(seed)) if seed else where
print("ready", flush=True)
sys.stdin.readline()  # until all are
for number in range(int(count)):
    what = f"{me}-{number}"
    target = AliasTarget(run="r", checkpoint=what.replace("-", "0"), name=what, manifest="0" * 64)
    while True:
        change = AliasChange(kind="promoted", target=target, at=datetime.now(UTC), by=me, why=what)
        try:
            made = append(store, "family/champion", change, after=newest(store, "family/champion"))
        except ConflictError:
            continue  # somebody else was first
        except TransientStoreError:
            print("failed", what, flush=True)
            break
        print("done", what, made.number, made.digest, flush=True)
        break
