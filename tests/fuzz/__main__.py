"""Fuzz targets: ``python -m tests.fuzz all --seconds 3600`` takes them in turn, ``python -m tests.fuzz alias`` one.

What comes after the name and ``--seconds`` goes to libFuzzer, such as ``-runs=1000 -seed=1``. Inputs that reach new
code are kept in ``build/fuzz/<target>``. What ends in anything but an error of ``peakpoint.errors``, or takes too long
or too much memory, is kept in ``build/fuzz/finds``; ``python -m tests.fuzz alias PATH`` runs such an input again. When
it is mended, it goes into ``tests/fuzz/corpus/<target>``, which ``test_fuzz.py`` runs every time.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

CORPUS, BUILD = Path(__file__).parent / "corpus", Path("build/fuzz")
INSTRUMENTED = ["peakpoint", "tomllib"]
LIMITS = ["-max_len=4096", "-timeout=25", "-rss_limit_mb=4096", "-print_final_stats=1"]
ODD_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    2**64,
    -(2**63),
    1.5,
    1e308,
    5e-324,
    "",
    "x",
    "a/b",
    "..",
    "NaN",
]
ODD_VALUES += ["\x00", "\x1b[2J", "9" * 50, "1e999", "2025-01-01T00:00:00Z", [], {}, [[]], {"": {}}, {"$": "tensor"}]


def mutate_tree(tree: Any, chooser: random.Random) -> Any:
    """Change one value, name or place in a tree of JSON."""
    if not isinstance(tree, dict | list) or not tree or chooser.random() < 0.1:
        return chooser.choice(ODD_VALUES)
    key = chooser.choice(list(tree if isinstance(tree, dict) else range(len(tree))))
    match chooser.randrange(8):
        case 0:
            del tree[key]
        case 1 if isinstance(tree, dict):
            tree[chooser.choice([*tree, "x", "", "\x00"])] = tree.pop(key)
        case 1:
            tree.append(tree[key])
        case 2:
            tree[key] = tree[chooser.choice(list(tree if isinstance(tree, dict) else range(len(tree))))]
        case _:
            tree[key] = mutate_tree(tree[key], chooser)
    return tree


def fuzz(name: str, options: list[str]) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris
    import torch  # noqa: F401 - before: its hundreds of modules are not to be instrumented

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.targets import ALLOWED, TARGETS

    def run(data: bytes) -> None:
        try:
            TARGETS[name](data)
        except ALLOWED:
            return

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        """Change JSON, also that of a record without its end, as JSON half of the time; libFuzzer changes bytes."""
        chooser = random.Random(seed)
        for end in (b"", b"}") if chooser.random() < 0.5 else ():
            try:
                text = json.dumps(mutate_tree(json.loads(data + end), chooser)).encode()
            except (ValueError, RecursionError):
                continue
            return text.removesuffix(end)[:max_size]
        return bytes(atheris.Mutate(data, max_size))

    folders = [] if any(Path(option).exists() for option in options) else [BUILD / name, CORPUS / name]
    for folder in [*folders, BUILD / "finds"]:
        folder.mkdir(parents=True, exist_ok=True)
    prefix = f"-artifact_prefix={BUILD / 'finds' / name}-"
    atheris.Setup([sys.argv[0], *LIMITS, prefix, *options, *map(str, folders)], run, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=0, help="for each target; 0: until stopped")
    arguments, options = parser.parse_known_args()
    options += [f"-max_total_time={arguments.seconds}"] if arguments.seconds else []
    if arguments.target != "all":
        fuzz(arguments.target, options)
    from tests.fuzz.targets import TARGETS

    failed = [
        name
        for name in TARGETS
        if subprocess.run([sys.executable, "-m", "tests.fuzz", name, *options], check=False).returncode
    ]
    print("finds in", ", ".join(failed) or "none")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
