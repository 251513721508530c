"""Code lines by room beside their ceilings: ``sizes.py`` shows and checks them, ``sizes.py --lower`` lowers them.

A code line bears code: no docstring, comment or blank line counts. A room above its ceiling (``sizes.toml``) fails the
check: it gives lines back before it takes new ones. Long modules and functions are listed, and fail nothing.
"""

import ast
import io
import sys
import tokenize
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "peakpoint"
CEILINGS = Path(__file__).with_suffix(".toml")
LONG_MODULE, LONG_FUNCTION = 400, 50  # physical lines
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def docstring_lines(tree: ast.Module) -> set[int]:
    """The lines of strings that stand alone: docstrings, and what documents a constant."""
    alone = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    texts = [node for node in alone if isinstance(node.value.value, str)]
    return {line for node in texts for line in range(node.lineno, node.end_lineno + 1)}


def code_lines(source: str) -> int:
    """How many lines of a source bear code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(source)))


def long_functions(source: str) -> list[tuple[str, int]]:
    """Functions over the bound, with their physical lines."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    sizes = [(node.name, node.end_lineno - node.lineno + 1) for node in functions]
    return [(name, size) for name, size in sizes if size > LONG_FUNCTION]


def main(*, lower: bool) -> int:
    """Print the table; returns 1 when a room is above its ceiling, or has none."""
    sizes: Counter[str] = Counter()
    long: list[str] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source, where = path.read_text(), path.relative_to(PACKAGE)
        sizes[where.parts[0].removesuffix(".py")] += code_lines(source)
        if source.count("\n") > LONG_MODULE:
            long.append(f"  {where}: {source.count(chr(10))} lines")
        long += [f"  {where}: {name} has {size} lines" for name, size in long_functions(source)]
    ceilings = tomllib.loads(CEILINGS.read_text())
    if lower:
        ceilings = {room: min(size, ceilings.get(room, size)) for room, size in sorted(sizes.items())}
        CEILINGS.write_text("".join(f"{room} = {size}\n" for room, size in ceilings.items()))
    print(f"{'room':<12} {'code':>6} {'ceiling':>8}")
    above = [room for room, size in sizes.items() if size > ceilings.get(room, 0)]
    for room, size in sorted(sizes.items()):
        print(f"{room:<12} {size:>6,} {ceilings.get(room, 0):>8,}" + ("  TOO LARGE" if room in above else ""))
    print(f"{'all':<12} {sum(sizes.values()):>6,} {sum(ceilings.values()):>8,}")
    print(f"over {LONG_MODULE} lines a module or {LONG_FUNCTION} a function:", *long, sep="\n")
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main(lower="--lower" in sys.argv[1:]))
