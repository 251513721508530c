"""Logs as tools write them: names, separators and counts are read as meant, and no column replaces another."""

import json

import pytest
import torch
from safetensors.torch import save_file

import peakpoint as pp
from peakpoint.errors import FormatError
from peakpoint.exchange import metric_logs
from peakpoint.exchange.metric_logs import LogRow, metric_names


def rows_of(folder, text, name="log.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return metric_logs.read(path)


TWO_ROWS = [LogRow(0, 4, {"val_loss": 0.5}), LogRow(1, 8, {"val_loss": 0.25})]


@pytest.mark.parametrize(
    "text",
    [
        "epoch,step,val_loss\n0,4,0.5\n1,8,0.25\n",
        "Epoch,Step,val_loss\n0,4,0.5\n1,8,0.25\n",
        "EPOCH,Iteration,val_loss\n0,4,0.5\n1,8,0.25\n",
        "\ufeffepoch,step,val_loss\r\n0,4,0.5\r\n1,8,0.25\r\n",
        "epoch , step , val_loss \n 0 , 4 , 0.5\n 1 , 8 , 0.25\n",
        "epoch;step;val_loss\n0;4;0,5\n1;8;0,25\n",
        "\ufeff Epoch ; Step ; val_loss\n0;4;0.5\n1;8;2,5e-1\n",
        "epoch\tstep\tval_loss\n0\t4\t0.5\n1\t8\t0.25\n",
        'epoch,step,note,val_loss\n0,4,"two\nlines, and a comma",0.5\n1,8,"",0.25\n',
        "epoch,step,val_loss\n0,4,0.5\n\n1,8,0.25,\n",
    ],
)
def test_forms_of_tables(text, tmp_path):
    assert rows_of(tmp_path, text) == TWO_ROWS


def test_percentages_are_read_as_they_are_written(tmp_path):
    text = "Epoch,Val Acc,other\n0,50%,12 %\n1,60 %,\n2,55,13%\n"
    assert [row.metrics for row in rows_of(tmp_path, text)] == [
        {"Val_Acc": 50.0, "other": 12.0},
        {"Val_Acc": 60.0},
        {"Val_Acc": 55.0, "other": 13.0},
    ]


@pytest.mark.parametrize("blank", ["", " ", "-", "None", "null", "N/A", "NA", "?"])
def test_what_is_written_for_no_value_is_none(blank, tmp_path):
    assert rows_of(tmp_path, f"epoch,acc,note\n0,0.5,good\n1,{blank},bad\n2,0.4,7.5.1\n") == [
        LogRow(0, None, {"acc": 0.5}),
        LogRow(2, None, {"acc": 0.4}),
    ]


@pytest.mark.parametrize("cell", ["0.9*", "1.234,5", "0.9 (best)", "60%%", "o.9"])
def test_text_among_numbers_is_refused_since_it_may_be_the_best_value(cell, tmp_path):
    with pytest.raises(FormatError, match=r"log.csv: row 2 has .* for 'acc', which has numbers in other rows"):
        rows_of(tmp_path, f'epoch,acc\n0,0.5\n1,"{cell}"\n2,0.4\n')
    records = [{"epoch": 0, "acc": 0.5}, {"epoch": 1, "acc": cell}, {"epoch": 2, "acc": None}]
    with pytest.raises(FormatError, match="row 2 has"):
        rows_of(tmp_path, json.dumps(records), "log.json")


@pytest.mark.parametrize("name", ["log", "log.txt", "log.log", "progress.tsv"])
def test_a_table_is_one_whatever_the_file_is_called(name, tmp_path):
    assert rows_of(tmp_path, "epoch,step,val_loss\n0,4,0.5\n1,8,0.25\n", name) == TWO_ROWS


def test_the_exact_name_of_an_axis_comes_first(tmp_path):
    assert rows_of(tmp_path, "Epoch,epoch,val_loss\n7,0,0.5\n") == [LogRow(0, None, {"Epoch": 7.0, "val_loss": 0.5})]


@pytest.mark.parametrize("name", ["metrics.json", "scalars.json", "20250301_120000.log.json", "log.jsonl", "log.txt"])
def test_records_on_lines_are_read_whatever_the_file_is_called(name, tmp_path):
    first, second = {"iteration": 19, "total_loss": 0.5}, {"iteration": 39, "total_loss": 0.4, "bbox/AP": 35.0}
    text = json.dumps({"env_info": "no moment", "seed": 1}) + "\n" + json.dumps(first) + "\n\n" + json.dumps(second)
    assert rows_of(tmp_path, text, name) == [
        LogRow(None, 19, {"total_loss": 0.5}),
        LogRow(None, 39, {"total_loss": 0.4, "bbox/AP": 35.0}),
    ]


def test_one_record_alone_is_a_log(tmp_path):
    assert rows_of(tmp_path, '{"epoch": 0, "a": 1}\n', "log.json") == [LogRow(0, None, {"a": 1.0})]
    assert rows_of(tmp_path, '{"epoch": 0, "a": 1}\n', "log") == [LogRow(0, None, {"a": 1.0})]
    assert rows_of(tmp_path, '{"epoch": 0, "a": 1}\n', "log.jsonl") == [LogRow(0, None, {"a": 1.0})]


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("val loss,val_loss", {"val_loss_2": 0.5, "val_loss": 0.9}),
        ("val_loss,val loss", {"val_loss": 0.5, "val_loss_2": 0.9}),
        ("AP@0.5:0.95,AP@0.5_0.95", {"AP@0.5_0.95_2": 0.5, "AP@0.5_0.95": 0.9}),
        ("loss,loss", {"loss": 0.5, "loss_2": 0.9}),
        ("loss, loss,loss 2,loss", {"loss": 0.5, "loss_3": 0.9, "loss_2": 1.0, "loss_4": 2.0}),
        ("val loss,val:loss", {"val_loss": 0.5, "val_loss_2": 0.9}),
    ],
)
def test_columns_whose_names_become_the_same_are_both_kept(header, names, tmp_path):
    [row] = rows_of(tmp_path, f"epoch,{header}\n0,0.5,0.9,1.0,2.0\n")
    assert row.metrics == names


def test_a_column_has_one_name_in_all_rows(tmp_path):
    rows = [{"step": 0, "val loss": 1.0}, {"step": 1, "val_loss": 2.0}, {"step": 2, "val loss": 3.0}]
    metrics = [row.metrics for row in rows_of(tmp_path, json.dumps(rows), "log.json")]
    assert metrics == [{"val_loss_2": 1.0}, {"val_loss": 2.0}, {"val_loss_2": 3.0}]


def test_no_two_columns_have_one_name():
    columns = ["a b", "a:b", "a_b_2", "a_b", "x" * 300, "x" * 299, "", " "]
    assert len(set(metric_names(columns).values())) == len(columns)


# --- epochs completed ---------------------------------------------------------------------------------------------

HISTORY = [{"epoch": float(number), "step": 4 * number, "eval_loss": 1 / number} for number in (1, 2, 3)]


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of transformers after three epochs."""
    path = tmp_path / "checkpoint-12"
    path.mkdir()
    save_file({"w": torch.ones(2)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 12, "epoch": 3.0, "log_history": HISTORY}))
    return path


def history_of(root):
    return [(report.epoch, report.step, dict(report.metrics)) for report in pp.open(root).run("r").history()]


@pytest.mark.parametrize("epochs_from", [0, 1])
def test_the_state_of_a_trainer_is_the_same_history_as_the_folder_s_own(folder, epochs_from, tmp_path):
    expected = [(number - 1, 4 * number, {"eval_loss": 1 / number}) for number in (1, 2, 3)]
    pp.import_checkpoints(folder, tmp_path / "alone", run="r")
    log = folder / "trainer_state.json"
    report = pp.import_checkpoints(folder, tmp_path / "joined", run="r", metrics=log, epochs_from=epochs_from)
    assert history_of(tmp_path / "alone") == expected
    assert history_of(tmp_path / "joined") == expected
    assert not any("--epochs-from" in note for note in report.notes)


def test_a_log_by_step_adds_to_the_history_of_a_folder(folder, tmp_path):
    (tmp_path / "log.csv").write_text("step,val_acc\n4,0.5\n12,0.7\n14,0.8\n")
    pp.import_checkpoints(folder, tmp_path / "root", run="r", metrics=tmp_path / "log.csv")
    assert history_of(tmp_path / "root") == [
        (0, 4, {"eval_loss": 1.0, "val_acc": 0.5}),
        (1, 8, {"eval_loss": 0.5}),
        (2, 12, {"eval_loss": 1 / 3, "val_acc": 0.7}),
        (None, 14, {"val_acc": 0.8}),
    ]


def test_epochs_with_fractions_are_epochs_completed(tmp_path):
    """A list of transformers' records: 0.5 and 1.0 are both in the first epoch."""
    records = [{"epoch": 0.5, "step": 2, "loss": 3.0}, {"epoch": 1.0, "step": 4, "loss": 2.0}]
    records.append({"epoch": 1.5, "step": 6, "loss": 1.0})
    rows = rows_of(tmp_path, json.dumps(records), "log.json")
    assert [(row.epoch, row.step, row.from_zero) for row in rows] == [(0, 2, True), (0, 4, True), (1, 6, True)]
