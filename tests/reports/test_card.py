"""Model cards: what they say is what is recorded, and their front matter is what the Hub reads."""

import json
import re
import shutil
import subprocess
import sys
from datetime import timedelta

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import peakpoint as pp
from peakpoint.cli.main import cli
from peakpoint.reports import card
from peakpoint.reports.card import ModelDescription
from peakpoint.reports.card.front_matter import front_matter
from peakpoint.reports.card.page import to_yaml
from peakpoint.repository import aliases, reader, validations
from peakpoint.repository.provenance import utc_now
from strategies import START, texts
from training import checkpointer, parts, train

EVIL = "# x\n---\n</b><script>[a](http://b) `` | \x1b[31m \x85 \u2028"


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


def promote(root, ref, kind="promoted", **members):
    repository = pp.open(root)
    run, one = repository.locate(ref)
    digest = reader.manifest_digest(run.store, one)
    target = aliases.AliasTarget(run=run.name, checkpoint=one.id, name=one.name, manifest=digest)
    change = aliases.AliasChange(kind=kind, target=target, at=utc_now(), **{"by": "anna", "why": "better", **members})
    return aliases.append(run.store, "champion", change, after=aliases.newest(run.store, "champion"))


def validate(root, ref, said="0.81 as recorded", **members):
    run, one = pp.open(root).locate(ref)
    plain = {
        "run": run.name,
        "checkpoint": one.id,
        "name": one.name,
        "number": 0,
        "manifest": reader.manifest_digest(run.store, one),
        "parts": tuple(one.parts),
        "at": START,
        "by": "anna",
        "wanted": validations.ValidationSpec(),
        "findings": (validations.Finding(check="metrics", outcome="passed", said=said, seconds=1.5),),
        "metrics": {"acc": 0.81},
        "environment": {"torch": "2"},
    }
    return validations.record(run.store, validations.Validation(**{**plain, **members}))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("card") / "runs"
    model, optimizer = parts()
    rules = [pp.Best("acc", "max"), pp.Best("loss", "min"), pp.Last(1)]
    state = {"model": model, "optimizer": optimizer}
    nan = pytest.warns(pp.PeakpointWarning, match="odd is nan")
    with nan, checkpointer(root, run="small", state=state, keep=rules) as ckpt:
        for epoch in ckpt.epochs(14):
            train(model, optimizer)
            ckpt.report(acc=0.8 - 0.01 * abs(epoch - 9), loss=1 / (epoch + 1), odd=float("nan"))
    promote(root, "small@latest", why="the first")
    validation = validate(root, "small@best:acc")
    promote(root, "small@best:acc", validation=validation.digest, comparison={"said": "acc 0.76 to 0.8 (better)"})
    pp.open(root).run("small").record("small@best:acc", {"test_acc": 0.79}, source="evaluate.py")
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "runs")


def page(root, ref="@champion", **told):
    return card.markdown(card.gather(pp.open(root), ref, ModelDescription(**told)))


def split(text):
    _, front, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), body


def test_it_says_what_is_recorded(root):
    one = pp.open(root).find_manifest("@champion")
    text = page(root)
    for said in (
        f"id {one.id}",
        "It is **champion** at present.",
        "| taken at | epoch 9 (from 0), step 10 |",
        "| acc | larger is better | 0.8 |  | 0.81 |",
        "| test\\_acc |  |  | 0.79 |  |",
        "- measured by evaluate.py, ",
        "| optimizer | torch.optim.sgd.SGD |",
        "| metrics | passed | 0.81 as recorded | 1.50 s |",
        "Environment: torch 2.",
        "| champion 2 |",
        "compared: acc 0.76 to 0.8 (better)",
        "- saved: best acc (max): 0.8",
        "| 9 | 10 | 0.8 | 0.1 | peak of acc, **this checkpoint** |",
        "| 13 | 14 | 0.76 | 0.0714286 | peak of loss |",
        *(file.digest for file in one.files),
        reader.manifest_digest(pp.open(root).store, one),
    ):
        assert said in text, said


def test_what_nobody_has_said_is_not_recorded(root):
    text = page(root, "small@latest")
    assert "| license | not recorded |" in text
    assert "## Data\n\nNot recorded.\n" in text
    assert "It was never validated." in text
    assert "| champion 1 |" in text
    assert "(promoted: better)" in text
    assert "at present" not in text
    told = page(root, license="mit", data="CIFAR-10, *augmented*", about="## Mine\n\nThe *best* one.\n")
    assert "| license | mit |" in told
    assert "CIFAR-10, \\*augmented\\*" in told
    assert "## About\n\n## Mine\n\nThe *best* one.\n" in told
    with checkpointer(root, run="bare", state={"x": 1}, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1)
    bare = page(root, "bare@latest")
    assert "## Metrics\n\nNot recorded.\n" in bare
    assert "No alias has ever pointed at it." in bare
    assert "model-index" not in split(bare)[0]


def test_the_front_matter(root):
    front, _ = split(
        page(root, license="mit", data="CIFAR-10", task="image-classification", base_model="a/b", tags=("x",))
    )
    assert front == front_matter(
        card.gather(
            pp.open(root),
            "@champion",
            ModelDescription(
                license="mit", data="CIFAR-10", task="image-classification", base_model="a/b", tags=("x",)
            ),
        )
    )
    assert front["tags"] == ["peakpoint", "x"]
    assert front["metrics"] == ["acc", "loss", "test_acc"]  # what is no number is left out
    [model] = front["model-index"]
    [result] = model["results"]
    assert (model["name"], result["dataset"]) == ("small", {"name": "CIFAR-10", "type": "cifar-10"})
    assert {one["type"]: one["value"] for one in result["metrics"]} == {"acc": 0.81, "loss": 0.1, "test_acc": 0.79}
    assert [one["name"] for one in result["metrics"]] == [
        "acc (evaluated again in its validation)",
        "loss (reported in training)",
        "test_acc (measured later)",
    ]


def test_the_hub_reads_it(root):
    hub = pytest.importorskip("huggingface_hub")
    found = hub.ModelCard(page(root, license="mit", data="CIFAR-10", task="image-classification"))
    assert found.data.license == "mit"
    assert {one.metric_type: one.metric_value for one in found.data.eval_results} == {
        "acc": 0.81,
        "loss": 0.1,
        "test_acc": 0.79,
    }
    assert {one.task_type for one in found.data.eval_results} == {"image-classification"}
    assert hub.ModelCard(page(root)).data.eval_results[0].dataset_name == "not recorded"


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
trees = st.recursive(
    st.dictionaries(texts, plain, min_size=1, max_size=3),
    lambda inner: st.dictionaries(
        texts,
        plain | inner | st.lists(plain, min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=2),
        min_size=1,
        max_size=3,
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_what_is_written_as_yaml_is_read_as_it_was(value):
    assert yaml.safe_load(to_yaml(value)) == value


@pytest.mark.parametrize("text", [EVIL, "a\n---\nb", "{{ mark }}", "null", "1e5", "\ufeff", "😀", "- a", "yes", "\x7f"])
def test_no_text_breaks_the_front_matter(root, text):
    front, _ = split(page(root, license=text, data=text, task=text, base_model=text, tags=(text,)))
    assert (front["license"], front["base_model"], front["tags"]) == (text, text, ["peakpoint", text])
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == text


def structure(text):
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(split(text)[1]):
        found.append(token.type)
        found += [child.type for child in token.children or () if child.type not in {"text", "text_special"}]
    return found


def test_no_text_makes_structure(root):
    """Reasons, sources, names of metrics: the same page as with plain words, on a terminal too."""

    def told(text, copy):
        at = shutil.copytree(root, copy)
        pp.open(at).run("small").record("small@best:acc", {"m": 1.0}, source=text)
        validation = validate(
            at, "small@best:acc", said=text, by=text, environment={"x": text}, against="x", alias="champion"
        )
        promote(
            at,
            "small@best:acc",
            "rolled back",
            restores=2,
            why=text,
            by=text,
            forced=(text,),
            comparison={"said": text},
        )
        assert validation.number == 2
        return page(at, license="mit", data=text)

    evil, good = told(EVIL, root.parent / "evil"), told("words", root.parent / "good")
    assert structure(evil) == structure(good)
    assert all(character.isprintable() or character == "\n" for character in evil)


def test_the_code_of_the_page_runs(root):
    _, body = split(page(root))
    [code] = re.findall(r"^```python\n(.*?)^```", body, re.DOTALL | re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print(sorted(weights))"],
        cwd=root.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "['0.bias', '0.weight', '2.bias', '2.weight']\n"
    assert code.count("pp.load(") == 2


def test_a_curve_lies_beside_it(root, tmp_path):
    pytest.importorskip("matplotlib")
    done = invoke("export", root, "@champion", "--as", "card", "--to", tmp_path / "out", "--license", "mit")
    assert done.exit_code == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "![The curve of acc, with its peak and this checkpoint](curve.png)" in text
    assert (tmp_path / "out/curve.png").read_bytes().startswith(b"\x89PNG")
    assert split(text)[0]["license"] == "mit"
    first = (tmp_path / "out/curve.png").read_bytes()
    found = json.loads(
        invoke("export", root, "@champion", "--as", "card", "--to", tmp_path / "out", "--json").output
    )  # ours: replaced
    assert found["markdown"] == (tmp_path / "out/README.md").read_text() != text
    assert (tmp_path / "out/curve.png").read_bytes() == first
    other = invoke("export", root, "small@latest", "--as", "card", "--to", tmp_path / "other")
    assert other.exit_code == 0
    assert (tmp_path / "other/curve.png").read_bytes() != first  # another place is marked


def test_without_matplotlib_there_is_a_table(root, tmp_path):
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from peakpoint.cli.main import run\n"
        f"sys.argv = ['peakpoint', *'export --as card @champion --to'.split(), {str(tmp_path / 'out')!r}]\n"
        f"sys.argv.insert(2, {str(root)!r})\n"
        "run()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Matplotlib is missing" in done.stdout
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["README.md"]
    text = (tmp_path / "out/README.md").read_text()
    assert "peak of acc, **this checkpoint**" in text
    assert "pip install 'peakpoint[report]'" in text


def test_the_curve_needs_no_scipy(root, tmp_path):
    """Matplotlib alone draws it: what chance explains is for reports."""
    pytest.importorskip("matplotlib")
    script = (
        "import sys; sys.modules['scipy'] = None\n"
        "from peakpoint.cli.main import run\n"
        f"sys.argv = ['peakpoint', 'export', {str(root)!r}, *'@champion --as card --to'.split(), {str(tmp_path)!r}]\n"
        "run()"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("library", ["jinja2", "yaml"])
def test_without_the_extra_the_message_says_what_to_install(root, library):
    script = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from peakpoint.cli.main import run\n"
        f"sys.argv = ['peakpoint', 'export', {str(root)!r}, '@champion', '--as', 'card']\n"
        "run()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == pp.errors.MissingExtraError.exit_code
    assert f"model cards need {library}, which is not installed: pip install 'peakpoint[card]'" in done.stderr


def test_files_of_somebody_else_stay(root, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(pp.ConflictError, match="is not an earlier card"):
        card.write(card.gather(pp.open(root), "@champion"), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert card.write(card.gather(pp.open(root), "@champion"), tmp_path, force=True)
    with pytest.raises(pp.errors.NotFoundError, match="does not exist"):
        invoke("export", root, "@champion", "--as", "card", "--about", tmp_path / "none.md")
    (tmp_path / "odd.md").write_bytes(b"\xff")
    with pytest.raises(pp.errors.ConfigError, match="is not text in UTF-8"):
        invoke("export", root, "@champion", "--as", "card", "--about", tmp_path / "odd.md")


def test_what_cannot_be_read_is_said(root):
    one = pp.open(root).find_manifest("@champion")
    [record] = (root / f"runs/small/validations/{one.id}").glob("*.json")
    record.write_bytes(record.read_bytes().replace(b"anna", b"ANNA"))
    alias = root / "aliases/champion/000002.json"
    alias.write_bytes(alias.read_bytes().replace(b"better", b"BETTER"))
    text = page(root, f"small/{one.id}")
    said = text.partition("## What could not be read")[2]
    assert said.count("is corrupt: its seal does not match its bytes") == 2
    assert "It was never validated." in text
    assert "at present" not in text


def test_the_holder_is_not_known_when_the_newest_record_is_damaged(root):
    alias = root / "aliases/champion/000002.json"
    alias.write_bytes(alias.read_bytes().replace(b"better", b"BETTER"))
    text = page(root, "small@latest")
    assert "| champion 1 |" in text
    assert "| not known |" in text
    assert "at present" not in text


def test_lineage_and_an_unclaimed_one(root):
    text = page(root, "small@latest")
    assert "- continued from `small/" in text
    assert "which was removed" in text
    first = pp.open(root).run("small").manifests()[0]
    assert "## Lineage" in page(root, f"small/{first.id}")


@pytest.mark.filterwarnings("ignore::peakpoint.PeakpointWarning")
def test_what_a_soup_was_made_from_is_its_lineage(tmp_path):
    with checkpointer(tmp_path, state={"model": parts()[0]}, keep=[pp.Last(2)]) as ckpt:
        ckpt.report(step=1)
        ckpt.report(step=2)
    refs = ["r:1", "r:2"]
    for _ in range(2):
        made = pp.soup(refs, root=tmp_path)
    page = card.markdown(card.gather(pp.open(tmp_path), made.checkpoint.ref))
    lineage = page.partition("## Lineage")[2].partition("##")[0].split("\n")
    found = pp.open(tmp_path)
    assert lineage[2:4] == [f"- made from `r/{found.find(ref).id}`" for ref in refs]
    assert "It has no parent" not in page


def test_an_abandoned_branch_is_said(root):
    back = pp.open(root).run("small").manifests()[0]
    model, optimizer = parts()
    state = {"model": model, "optimizer": optimizer}
    with checkpointer(root, run="small", state=state, resume=f"small/{back.id}", keep=[pp.Last(9)]) as ckpt:
        ckpt.resume()
        ckpt.report(acc=0.1, epoch=10)
    text = page(root, "small@latest")
    assert f"- continued from `small/{back.name}`\n" in text
    assert "- abandoned branches before it: 1\n" in text


def test_a_former_holder_by_the_number_of_its_record(root):
    assert page(root, "@champion:1") == page(root, "small@latest")
    assert front_matter(card.gather(pp.open(root), "@champion", ModelDescription(data="a/b")))["datasets"] == ["a/b"]


def test_an_old_validation_of_another_manifest_is_said(root):
    validate(root, "@champion", manifest="0" * 64, at=START + timedelta(days=1))
    assert "Its manifest has changed since then: the validation is of other bytes." in page(root)
