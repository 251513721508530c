"""Reports as people get them: the command, its files, and the page in a browser."""

import csv
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import peakpoint as pp
from peakpoint.cli.main import cli
from peakpoint.cli.render import literal
from peakpoint.cli.tables import PlainTable
from peakpoint.reports.evaluation import evaluate, files, pages, tables, write
from peakpoint.reports.evaluation.tables import ReportTable
from training import checkpointer

pytestmark = pytest.mark.filterwarnings("ignore:.*never counts as best:peakpoint.PeakpointWarning")

EVIL = (
    '</style><script>alert(1)</script>"|[red]$\\frac$`_x_`{<!--&amp;' + chr(0x9B) + chr(0xFFFE) + chr(0x202E) + "精度"
)
SHOWN = EVIL.replace(chr(0x9B), "\\x9b").replace(chr(0xFFFE), "\\ufffe").replace(chr(0x202E), "\\u202e")
RUN = "from peakpoint.cli.main import run; run()"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two plain runs, one with a hostile metric, and one that prunes."""
    root = tmp_path_factory.mktemp("reports") / "runs [b]"
    for name, top in (("one", 0.8), ("_two", 0.7)):
        with checkpointer(root, run=name, state={"x": 1}, keep=[pp.Best("val_acc", "max"), pp.Last(1)]) as ckpt:
            for epoch in range(30):
                acc = top - abs(epoch - 20) / 100
                ckpt.report(val_acc=acc, train_acc=epoch / 30, val_loss=1 - acc, epoch=epoch, step=epoch)
    with checkpointer(root, run="evil", state={"x": 1}, keep=[pp.Best(EVIL, "max"), pp.Last(1)]) as ckpt:
        for step in range(30):
            ckpt.report({EVIL: [math.nan, math.inf, 1e308, -1e308, 0.5][step % 5]}, step=step)
    rules = [pp.BestAtSparsity("acc", "max", targets=(0.0, 0.5)), pp.Last(2)]
    with checkpointer(root, run="pruned", state={"model": {"w": 1.5}}, keep=rules) as ckpt:
        for step, sparsity in enumerate([0.0, 0.5, 0.9]):
            ckpt.report(acc=0.9 - sparsity / 10, sparsity=sparsity, step=step)
    return root


def invoke(*arguments, code=0):
    result = CliRunner().invoke(cli, ["report", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def process(*arguments, **environment):
    command = [sys.executable, "-c", RUN, "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


# --- the command --------------------------------------------------------------------------------------------------


def test_a_terminal_gets_tables(root):
    text = invoke(root, "one", "_two", "--n-eval", "val_acc=10000")
    assert "Best against last" in text
    numbers = r"0\.8 ± 0\.0\d+ +epoch 20 +0\.71 +epoch 29 +0\.09 +0\.00\d+ +0\.0[12]\d*"
    assert re.search(rf"one +val_acc max .* {numbers} .* peak", text), "lost and luck are in the same unit"
    assert "\x1b" not in text


def test_a_metric_may_look_like_markup(root):
    text = invoke(root, "evil")
    assert "</style>" in text
    assert not any(character in text for character in (chr(0x9B), chr(0x202E)))


def test_json_has_everything(root):
    found = json.loads(invoke(root, "--json", "--n-eval", "val_acc=10000", "--group-by", "(one|two)"))
    assert [run["run"] for run in found["runs"]] == ["_two", "evil", "one", "pruned"]
    peak = next(one for one in found["peaks"] if one["run"] == "one")
    assert (peak["verdict"], peak["peak"]["best_epoch"]) == ("peak", 20)
    assert peak["peak"]["lost"] == pytest.approx(0.09)
    assert [group["name"] for group in found["groups"][0]["groups"]] == ["one", "two"]
    assert [spot["sparsity"] for spot in found["tradeoffs"][0]["spots"] if spot["on_front"]] == [0, 0.5, 0.9]
    assert found["comparisons"][0]["differences"][0]["interval"] is None
    assert found["files"] == []


def test_of_many_runs_the_first_twenty_are_shown_and_the_others_folded(tmp_path):
    for number in range(22):
        with checkpointer(tmp_path / "runs", run=f"r{number:02}", state={"x": 1}, keep=[pp.Best("acc", "max")]) as ckpt:
            ckpt.report(acc=number / 100, step=1)
    text = invoke(tmp_path / "runs")
    assert text.count("and 2 more; --to report.html has all\n") == 2, "results and runs"
    assert text.index("r21 ") < text.index("r02 ") < text.index("and 2 more")
    assert text.index("Best against last") < text.index("\nRuns\n")
    invoke(tmp_path / "runs", "--to", tmp_path / "report.html", "--to", tmp_path / "report.md")
    for page in ((tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()):
        folded = re.findall(r"<details>\s*<summary>2 more</summary>(.*?)</details>", page, re.DOTALL)
        assert [sorted(set(re.findall(r"\br\d\d\b", part))) for part in folded] == [["r00", "r01"], ["r20", "r21"]]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["onee"], 10, "did you mean 'one'"),
        (["--metric", "val_acc"], 2, "is larger better?"),
        (["--metric", "val_acc:up"], 2, "max"),
        (["--metric", "val_ac:max"], 10, "did you mean 'val_acc'"),
        (["--sparsity", "sparsty"], 10, "did you mean 'sparsity'"),
        (["--part", "nope"], 10, "no part 'nope'"),
        (["--n-eval", "many"], 2, "not a number of examples"),
        (["--n-eval", "5", "--n-eval", "6"], 2, "given twice"),
        (["--n-eval", "100"], 2, "is 1e+308 somewhere"),
        (["--percent"], 2, "--percent has no effect without --n-eval"),
        (["--group-by", "("], 2, "not a regular expression"),
        (["--compare", "one", "three"], 10, "no run 'three'"),
        (["--compare", "one", "one"], 10, "write part="),
        (["--to", "x.pdf"], 2, "must end with .html"),
        (["--to", "{tmp}/no/such/../file"], 2, "without a suffix"),
        (["--to", "{tmp}/file/x.png"], 20, "cannot write"),
        (["--to", "{tmp}/foreign.html"], 11, "--force"),
        (["pruned", "--metric", "sparsity:max", "--group-by", "x"], 2, "exactly one group"),
    ],
)
def test_wrong_input_gets_one_clear_error(root, tmp_path, arguments, code, words):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign.html").write_text("mine")
    (tmp_path / "no" / "such").mkdir(parents=True)
    (tmp_path / "no" / "file").write_text("mine")
    done = process(root, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "foreign.html").read_text() == (tmp_path / "file").read_text() == "mine"


def test_the_command_starts_without_what_it_does_not_use(root):
    script = (
        "import sys; from peakpoint.cli.main import cli; cli.main(['report', sys.argv[1]], standalone_mode=False);"
        "heavy = ('torch', 'numpy', 'scipy', 'matplotlib', 'jinja2', 'sqlalchemy');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("package", "options"),
    [
        ("matplotlib", ["--to", "x.png"]),
        ("matplotlib", ["--to", "x.html"]),
        ("jinja2", ["--to", "x.html"]),
        ("scipy", ["one", "--n-eval", "val_acc=100"]),
    ],
)
def test_a_missing_extra_is_named(root, tmp_path, package, options):
    (tmp_path / "none" / package).mkdir(parents=True)
    (tmp_path / "none" / package / "__init__.py").write_text(f"raise ModuleNotFoundError('none', name='{package}')")
    path = os.pathsep.join([str(tmp_path / "none"), *filter(None, sys.path)])
    done = process(root, *options, PYTHONPATH=path)
    assert done.returncode == 2
    assert f"need {package}, which is not installed: pip install 'peakpoint[report]'" in done.stderr


def test_notes_say_what_they_are_about(tmp_path):
    chance = random.Random(1)
    for run, count in (("long", 40), ("short", 24), ("said", 24)):
        with checkpointer(tmp_path, run=run, state={"x": 1}, keep=[pp.Best("acc", "max"), pp.Last(1)]) as ckpt:
            for step in range(count):
                more = {"loss": 0.25, "loss_se": 0.1} if run == "said" else {"loss": chance.random()}
                ckpt.report(acc=chance.random() / 2, **more, step=step)
    text = " ".join(invoke(tmp_path, "--metric", "acc:max", "--metric", "loss:min").split())
    assert (
        "± of acc in long; loss in long is the standard error of one value: the scatter of the last 20 values" in text
    )
    assert (
        "± of acc in said, short; loss in short is the standard error of one value: the scatter of the last 12" in text
    )
    assert "± of loss in said is the standard error of one value: reported as loss_se" in text
    assert "± of acc is the standard error of one value: a proportion of 9 " in invoke(tmp_path, "--n-eval", "acc=9")
    both = invoke(tmp_path, "--metric", "acc:max", "--metric", "loss:min", "--compare", "long", "said", "--part", "x")
    both = " ".join(both.split())
    assert "The 95 % interval of acc assumes" in both
    assert "the scatter of the last 20 values (original) and the scatter of the last 12 values (compressed)" in both
    assert "the scatter of the last 20 values (original) and reported as loss_se (compressed)" in both


def test_the_front_says_what_beaten_means(root):
    text = " ".join(invoke(root, "pruned").split())
    assert "3 of 3 checkpoints are Pareto-optimal: no other is at least as good in both and better in one." in text


def test_a_note_about_several_runs_is_one_note(root):
    with_few = " ".join(invoke(root, "one", "_two").split())
    assert with_few.count("one, _two, val_acc: ") == 1
    assert with_few.count("; pass --n-eval") == 1


def test_another_checkpoint_with_the_same_value_is_as_good(tmp_path):
    with checkpointer(tmp_path, run="r", state={"x": 1}, keep=[pp.Last(1)]) as ckpt:
        for step, acc in enumerate([0.7, 0.6, 0.7]):
            ckpt.report(acc=acc, step=step)
    text = " ".join(invoke(tmp_path, "--metric", "acc:max").split())
    assert re.search(r"removed; r/\w{8} has the same value", text)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_a_report_is_replaced_by_the_next_and_nothing_else_is(root, tmp_path, suffix):
    path = tmp_path / f"report{suffix}"
    invoke(root, "one", "--to", path)
    first = path.read_bytes()
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~_umask())
    invoke(root, "one", "--to", path)
    assert path.read_bytes() == first, "the same values give the same bytes"
    path.write_bytes(b"mine")
    with pytest.raises(pp.ConflictError):
        write(evaluate(pp.open(root)), path)
    assert path.read_bytes() == b"mine"
    write(evaluate(pp.open(root), ["one"]), path, force=True)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_full_disk_leaves_the_earlier_report_and_nothing_else(root, tmp_path):
    path = tmp_path / "report.json"
    invoke(root, "one", "--to", path)
    first = path.read_bytes()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
    command = [sys.executable, "-c", limit + RUN, "report", root, "--to", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 20, done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_is_no_file_is_not_replaced(root, tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(pp.errors.StoreError, match="cannot look at"):
        write(evaluate(pp.open(root), ["one"]), tmp_path)


def test_a_directory_gets_all_of_it(root, tmp_path):
    text = invoke(root, "--to", tmp_path / "new", "--separate")
    files = {file.name for file in (tmp_path / "new").iterdir()}
    assert {"report.html", "report.md", "report.json", "report.csv", "one-acc.png", "_two-acc.png"} <= files
    assert all(name in text for name in files)
    for target in re.findall(r"!\[.*?\]\(([^)]+)\)", (tmp_path / "new" / "report.md").read_text()):
        assert (tmp_path / "new" / target).read_bytes().startswith(b"\x89PNG")


def test_pictures_whose_names_become_the_same_are_all_written(tmp_path):
    with checkpointer(
        tmp_path / "r", run="r", state={"x": 1}, keep=[pp.Best("a/b", "max"), pp.Best("a?b", "max")]
    ) as ckpt:
        ckpt.report({"a/b": 1.0, "a?b": 2.0}, step=1)
    files = write(evaluate(pp.open(tmp_path / "r")), tmp_path / "out")
    assert len({file for file in files if file.suffix == ".png"}) == 2


def test_the_csv_holds_every_value(root, tmp_path):
    report = evaluate(pp.open(root))
    [file] = write(report, tmp_path / "x.csv")
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    values = [row for run in report.runs for row in run.rows()]
    assert len(rows) == len(values) == 30 * 3 * 2 + 30 + 3 * 2
    for row, cells in zip(rows, values, strict=True):
        assert list(row.values()) == ["" if cell is None else str(cell) for cell in cells]
    accuracies = [row for row in rows if row["run"] == "one" and row["metric"] == "val_acc"]
    [best] = [row for row in accuracies if float(row["value"]) == 0.8]
    assert (best["epoch"], best["saved"], best["kept"]) == ("20", "True", "True")
    assert pp.open(root).find(best["checkpoint"]).epoch == 20
    assert [row["kept"] for row in accuracies].count("True") == 2


class Tags(HTMLParser):
    """The elements of a page, and the text between them."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.attributes = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_a_page_is_one_file_and_hostile_names_are_text(root):
    page = pages.html(evaluate(pp.open(root)), svgs(root))
    found = Tags(page)
    assert "script" not in found.tags
    assert found.tags.count("svg") == len(svgs(root)) >= 3
    assert f"{SHOWN} max" in found.text
    assert any(SHOWN[:19] in text for text in found.text if "…" in text), "in the legend of a picture"
    assert any(text == "\u2009_two" for text in found.text), "in a legend"
    for name, value in found.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:,"))
        assert "url(" not in (value or "").replace("url(#", "")
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[5:-1] for _, value in found.attributes if (value or "").startswith("url(#")} <= set(ids)


def test_a_run_looks_the_same_in_every_picture_of_a_page(tmp_path):
    both = [pp.Best("acc", "max"), pp.Best("loss", "min"), pp.Last(1)]
    rules = {"a": both, "b": [pp.BestAtSparsity("acc", "max", targets=(0.0, 0.5)), pp.Last(2)], "c": both[1:]}
    for run, keep in rules.items():
        with checkpointer(tmp_path, run=run, state={"model": {"w": 1.5}}, keep=keep) as ckpt:
            for step, sparsity in enumerate([0.0, 0.5]):
                ckpt.report(acc=0.5 + step / 10, loss=0.5 - step / 10, sparsity=sparsity, step=step)
    found = evaluate(pp.open(tmp_path))
    from peakpoint.reports.evaluation import figures

    looks = {}
    for panel in figures.panels(found):
        for line in panel.legend:
            if line.get_label() in rules:
                looks.setdefault(line.get_label(), []).append((line.get_color(), line.get_marker()))
    assert {run: len(some) for run, some in looks.items()} == {"a": 3, "b": 2, "c": 1}
    assert all(len(set(some)) == 1 for some in looks.values())
    assert len({some[0] for some in looks.values()}) == len({some[0][0] for some in looks.values()}) == 3
    said = [text for text in found.remarks if "in no picture" in text]
    assert [text.partition(" is in")[0] for text in said] == ["acc of c", "loss of b"]


@given(st.lists(st.lists(st.integers(0, 20), unique=True, min_size=1, max_size=6), max_size=8))
def test_no_two_runs_look_the_same(pictures):
    from peakpoint.reports.evaluation import figures

    looks = figures.RunLooks({})
    shown = [looks.of(map(str, runs)) for runs in pictures]
    assert all(looks.by_run[run] == look for picture in shown for run, look in picture.items())
    assert len(set(looks.by_run.values())) == len(looks.by_run)
    if len(looks.by_run) <= 6:
        assert len({colour for colour, _ in looks.by_run.values()}) == len(looks.by_run)


def svgs(root):
    from peakpoint.reports.evaluation import figures

    return [(figures.svg(panel), panel.alt) for panel in figures.panels(evaluate(pp.open(root)))]


@given(st.lists(st.lists(st.text(max_size=20), min_size=2, max_size=2), max_size=4), st.text(max_size=20))
def test_no_text_becomes_markup(rows, title):
    table = ReportTable(title=title, columns=("a", ">b"), rows=tuple(map(tuple, rows)), notes=(title,))
    found = Tags(page_of(table))
    outside = {"html", "head", "meta", "link", "title", "style", "body", "h1", "p"}
    inside = {"h2", "div", "table", "thead", "tr", "th", "tbody", "td", "span", "ul", "li"}
    assert set(found.tags) <= outside | inside
    assert "".join(found.text).count(pages.printable(title)) >= 2 * bool(title)


def page_of(table):
    return pages._render(
        location="runs", about="runs: 1 run", tables_above=[table], pictures=[], tables_below=[], remarks=[]
    )


def test_ids_and_short_cells_are_not_broken():
    """What a browser makes of it is in the slow tests."""
    cells = (
        "a" * 20,
        "a" * 21,
        "removed; the best kept is some-long-run/9e689312 with 0.89",
        "run/9e689312_epoch0_step0",
    )
    page = page_of(ReportTable(title="t", columns=("a", "b", "c", "d"), rows=(cells,)))
    body = ET.fromstring(page[page.index("<tbody>") : page.index("</tbody>")] + "</tbody>")
    found = [(cell.get("class"), "".join(cell.itertext())) for cell in body.iter("td")]
    assert found == [("tight", cells[0]), *((None, cell) for cell in cells[1:])]
    assert [span.text for span in body.iter("span")] == ["/9e689312"]
    assert "td span { white-space: nowrap }" in page


@given(st.text(max_size=30))
def test_no_text_becomes_markdown(text):
    """Against a renderer of Markdown: a cell shows the text."""
    markdown = pytest.importorskip("markdown_it")
    rendered = markdown.MarkdownIt("commonmark").enable("table").render(f"| a |\n|---|\n| x{pages.escaped(text)}x |\n")
    found = Tags(rendered)
    assert set(found.tags) == {"table", "thead", "tbody", "tr", "th", "td"}
    cell = "".join(found.text).split("\n")
    assert f"x{pages.printable(text)}x" in cell


def test_the_markdown_of_a_hostile_run_shows_its_name(root):
    markdown = pytest.importorskip("markdown_it")
    text = pages.markdown(evaluate(pp.open(root)), [("a.png", EVIL)])
    found = Tags(markdown.MarkdownIt("commonmark").enable("table").render(text))
    assert "script" not in found.tags
    assert f"{SHOWN} max" in found.text


def test_an_svg_says_what_made_it_and_not_when(root, tmp_path):
    [file] = write(evaluate(pp.open(root), ["one"]), tmp_path / "x.svg")
    tree = ET.parse(file)
    assert tree.getroot().tag.endswith("svg")
    assert "peakpoint report" in file.read_text()
    assert not re.search(r"\d{4}-\d\d-\d\dT", file.read_text())


def test_nothing_can_be_reported_but_not_drawn(tmp_path):
    with checkpointer(tmp_path / "r", run="r", state={"x": 1}, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1)
    found = evaluate(pp.open(tmp_path / "r"))
    for suffix in (".html", ".md", ".json", ".csv"):
        write(found, tmp_path / f"x{suffix}")
    with pytest.raises(pp.errors.ConfigError, match="nothing to draw"):
        write(found, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@given(st.lists(st.text("ab [0]", min_size=1, max_size=12), min_size=2, max_size=6), st.integers(10, 80))
def test_on_a_narrow_terminal_every_cell_is_there(cells, width):
    """Cells in the order of their columns, whatever they hold, and no line is wider than the terminal."""
    heads = [f">head{number}" for number in range(len(cells))]
    console = Console(width=width, file=io.StringIO())
    console.print(PlainTable(heads, [[literal(cell) for cell in cells]]))
    printed = console.file.getvalue()
    assert max(map(len, printed.split("\n"))) <= width
    squeezed = "".join(printed.split())
    place = 0
    for cell in cells:
        place = squeezed.find("".join(cell.split()), place)
        assert place >= 0, printed


def test_a_run_that_is_being_written_can_be_reported(tmp_path):
    with checkpointer(tmp_path / "r", run="r", state={"x": 1}, keep=[pp.Best("acc", "max")]) as ckpt:
        ckpt.report(step=1, acc=0.5)
        assert "being written by" in invoke(tmp_path / "r")
    assert "finished" in invoke(tmp_path / "r")


@pytest.mark.slow
def test_the_report_in_the_documentation_is_what_the_example_gives(tmp_path):
    """Its tables and their columns; the numbers depend on the machine."""
    here = Path(__file__).parents[2]
    script = here / "examples" / "compare_optimizers.py"
    subprocess.run([sys.executable, "-W", "error", script, tmp_path / "runs"], capture_output=True, check=True)
    found = evaluate(pp.open(tmp_path / "runs"), n_eval={"val_accuracy": 1197})
    files = {file.name for file in write(found, tmp_path / "report")}
    shown = (here / "docs" / "report" / "report.md").read_text()
    now = (tmp_path / "report" / "report.md").read_text()
    heads = re.compile(r"^(?:## .*|\| .* \|\n\|[-:|]+\|)$", re.MULTILINE)
    assert heads.findall(now) == heads.findall(shown)
    assert {file.name for file in (here / "docs" / "report").iterdir()} == {
        name for name in files if name.endswith((".png", ".md"))
    }
    assert {"peak", "within noise"} <= {one.verdict for one in found.peaks}


# --- a real browser -----------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_opens_in_a_browser_without_errors_and_without_the_network(root, tmp_path):
    [page] = write(evaluate(pp.open(root)), tmp_path / "report.html")
    log = tmp_path / "net.json"
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr", "--dump-dom"),
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = Tags(done.stdout)
    assert found.tags.count("table") == len(tables.tables(evaluate(pp.open(root)))) == 5
    assert found.tags.count("svg") == len(svgs(root))
    assert f"{SHOWN} max" in found.text
    asked = set(re.findall(r'"url":"([^"]+)"', log.read_text()))
    assert not {url for url in asked if page.name in url} - {page.as_uri()}
    initiated = [url for url in asked if not url.startswith(("file:", "data:", "chrome", "devtools"))]
    browsers_own = re.compile(r"https?://[^/]*\.?(google|googleapis|gstatic|gvt1)\.com")
    assert [url for url in initiated if not browsers_own.match(url)] == []


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_fits_a_phone(root, tmp_path):
    """Only tables and pictures scroll sideways, in boxes of their own."""
    [page] = write(evaluate(pp.open(root)), tmp_path / "report.html")
    outer = tmp_path / "phone.html"
    outer.write_text(
        f'<iframe id="p" style="width:390px;height:800px" src="{page.name}"></iframe><script>'
        'const frame = document.getElementById("p"); frame.onload = () => { const root = '
        "frame.contentDocument.documentElement; document.title = root.scrollWidth + '/' + root.clientWidth }</script>"
    )
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", outer.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(\d+)/(\d+)</title>", done.stdout)
    assert found, done.stdout[:500]
    assert int(found[1]) <= int(found[2])
