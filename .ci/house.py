"""Measures of the source by room beside their ceilings: ``house.py`` checks them, ``house.py --lower`` lowers them.

Three measures by room: lines that bear code (no docstring, comment or blank line counts), uses of placeholder names (a
name such as ``found`` says nothing about what it holds) in ten thousand name uses, and class names that another module
defines too. A room above a ceiling (``house.toml``) fails the check: it gives back before it takes new ones. So do a
module above its bound, and functions of which more than one in ten is above theirs; single long functions are listed.
"""

import ast
import io
import sys
import tokenize
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "peakpoint"
CEILINGS = Path(__file__).with_suffix(".toml")
MODULE_LINES, FUNCTION_LINES, FUNCTION_LINES_P90 = 450, 50, 25  # physical lines
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
PLACEHOLDERS = frozenset(
    """
    after again arrived asked asks at awaits back before born both came chosen done each every everything
    foo former found given gone got had have having held here into it judged kept known late least left
    look looked looking looks lost made mine more most moved named needed news noted nothing obj one opened other
    others ours out own passed present put res rest ret said same seen shown some something standing stuff taken temp
    that theirs them there these thing things this those tmp told val wanted what which whole wish wishes words
    """.split()  # noqa: SIM905  (a list of a hundred quoted words is no easier to read)
)


def docstring_lines(tree: ast.Module) -> set[int]:
    """The lines of strings that stand alone: docstrings, and what documents a constant."""
    alone = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    texts = [node for node in alone if isinstance(node.value.value, str)]
    return {line for node in texts for line in range(node.lineno, node.end_lineno + 1)}


def code_lines(source: str) -> int:
    """Count the lines of a source that bear code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(source)))


def name_uses(tree: ast.Module) -> Iterator[str]:
    """Every use of a variable, function or class by its name, and every parameter."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def placeholders(tree: ast.Module) -> Counter[str]:
    """Uses of names that say nothing about what they hold."""
    return Counter(name for name in name_uses(tree) if name.strip("_") in PLACEHOLDERS)


def doubled_classes(classes: dict[str, list[str]]) -> dict[str, list[str]]:
    """Class names that several modules define: private or not, a leading underscore makes no other word of it."""
    plain: defaultdict[str, list[str]] = defaultdict(list)
    for module, names in classes.items():
        for name in names:
            plain[name.lstrip("_")].append(module)
    return {name: modules for name, modules in sorted(plain.items()) if len(modules) > 1}


def function_sizes(tree: ast.Module) -> list[tuple[str, int]]:
    """Functions with their physical lines."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(node.name, node.end_lineno - node.lineno + 1) for node in functions]


class House:
    """Everything measured over the package."""

    def __init__(self, package: Path) -> None:
        self.code: Counter[str] = Counter()
        self.uses: Counter[str] = Counter()
        self.placeholders: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.functions: list[tuple[str, int]] = []
        self.modules: list[tuple[str, int]] = []
        classes: dict[str, list[str]] = {}
        for path in sorted(package.rglob("*.py")):
            source, where = path.read_text(), str(path.relative_to(package))
            tree, room = ast.parse(source), self.room(where)
            self.code[room] += code_lines(source)
            self.uses[room] += sum(1 for _ in name_uses(tree))
            self.placeholders[room] += placeholders(tree)
            self.functions += [(f"{where}: {name}", size) for name, size in function_sizes(tree)]
            self.modules.append((where, source.count("\n")))
            classes[where] = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        self.doubled = doubled_classes(classes)

    @staticmethod
    def room(where: str) -> str:
        """The room of a module: a folder, or one of the few files beside them."""
        return Path(where).parts[0].removesuffix(".py")

    def measures(self) -> dict[str, dict[str, int]]:
        """Room to each of its measures, in the order of ``house.toml``."""
        doubled = Counter(self.room(where) for modules in self.doubled.values() for where in modules)
        return {
            room: {
                "code": self.code[room],
                "placeholders": round(10_000 * sum(self.placeholders[room].values()) / max(self.uses[room], 1)),
                "doubled": doubled[room],
            }
            for room in sorted(self.code)
        }

    def long_functions(self) -> list[str]:
        """Functions that deserve a look."""
        return [f"{name} has {size} lines" for name, size in self.functions if size > FUNCTION_LINES]

    def above_bounds(self) -> list[str]:
        """Modules above their bound, and the functions as a whole."""
        lines = [f"{where}: {size} lines, ABOVE {MODULE_LINES}" for where, size in self.modules if size > MODULE_LINES]
        sizes = sorted(size for _, size in self.functions)
        p90 = sizes[int(0.9 * len(sizes))] if sizes else 0
        return lines + (
            [f"one function in ten has {p90} lines or more, ABOVE {FUNCTION_LINES_P90}"]
            if p90 > FUNCTION_LINES_P90
            else []
        )


def table(measures: dict[str, dict[str, int]], ceilings: dict[str, dict[str, int]]) -> tuple[list[str], bool]:
    """The lines to print, and whether a room is above a ceiling."""
    lines, above = [f"{'room':<12} {'code':>14} {'placeholders':>14} {'doubled':>10}"], False
    for room, values in measures.items():
        bounds = ceilings.get(room, {})
        high = [measure for measure, value in values.items() if value > bounds.get(measure, 0)]
        cells = {measure: f"{value:,}/{bounds.get(measure, 0):,}" for measure, value in values.items()}
        shown = f"{room:<12} {cells['code']:>14} {cells['placeholders']:>14} {cells['doubled']:>10}"
        lines.append(shown + (f"  ABOVE ITS CEILING: {', '.join(high)}" if high else ""))
        above = above or bool(high)
    return lines, above


def main(*, lower: bool, details: str = "") -> int:
    """Print the table; returns 1 when a room is above a ceiling, or has none."""
    house = House(PACKAGE)
    measures = house.measures()
    ceilings = tomllib.loads(CEILINGS.read_text())
    if lower:
        ceilings = {
            room: {measure: min(value, ceilings.get(room, {}).get(measure, value)) for measure, value in values.items()}
            for room, values in measures.items()
        }
        texts = (
            f"{room} = {{ {', '.join(f'{k} = {v}' for k, v in row.items())} }}\n" for room, row in ceilings.items()
        )
        CEILINGS.write_text("".join(texts))
    lines, above = table(measures, ceilings)
    print(*lines, sep="\n")
    words, uses = sum(sum(names.values()) for names in house.placeholders.values()), house.uses.total()
    print(f"{house.code.total():,} lines of code; {words:,} of {uses:,} names are placeholders ({words / uses:.1%})")
    if house.doubled and not details:
        print(f"{len(house.doubled)} class names mean several things: {', '.join(house.doubled)}")
    if details:
        print(f"\n{details}: placeholders", *(f"{name} {n}" for name, n in house.placeholders[details].most_common()))
        mine = [f"{n}: {', '.join(m)}" for n, m in house.doubled.items() if details in map(house.room, m)]
        print(*mine, *(line for line in house.long_functions() if house.room(line) == details), sep="\n")
    else:
        print("long functions:", *house.long_functions(), sep="\n  ")
    print(*house.above_bounds(), sep="\n")
    return int(above or bool(house.above_bounds()))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    rooms = [argument for argument in arguments if not argument.startswith("--")]
    sys.exit(main(lower="--lower" in arguments, details=rooms[0] if rooms else ""))
