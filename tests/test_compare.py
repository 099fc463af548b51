"""Prediction and measurement side by side: errors, which table a run belongs to, what is said about it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fasim.simulator.errors import UsageError
from fasim.simulator.predict import predict
from fasim.simulator.problem.tile import Tile
from fasim.simulator.problem.workload import Workload
from fasim.simulator.results.run import Bytes, Measurement, Run
from fasim.traces import compare as book
from fasim.traces import explanation, store

WORK = Workload(1, 4, 1024)


def measured(run: Run, implementation: str = "cuda", slower: float = 1.0, **taken) -> Run:
    """A measured run that is as predicted, its cycles and its time multiplied by `slower`."""
    total = Bytes(None, None, *(run.traffic.total(name) for name in ("l2_read", "l2_write", "hbm_read", "hbm_write")))
    time_s = slower * run.cycles / run.sm_clock_hz
    how = {"regime": "sustained", "l2": "cold"} | taken
    return replace(
        run,
        origin="measured",
        cycles=round(run.cycles * slower),
        traffic=replace(run.traffic, by_tensor={"all": total}, smem_bytes=None),
        lanes=(),
        labels=(),
        spans=run.spans[:0],
        measurement=Measurement(
            kernel=run.schedule, implementation=implementation, gpu="NVIDIA H200", driver="580", cuda="13.0", date="2026-11-21",
            buffers=2, launch="stream", calls=100, time_s=time_s, time_p10_s=time_s, time_p90_s=time_s, **how,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def predicted() -> Run:
    return predict(WORK, schedule="pingpong", device="h200")


def test_a_run_that_is_as_predicted_has_no_error(predicted):
    found = book.compare(predicted, measured(predicted))
    assert all(row.error == pytest.approx(0.0) for row in found.rows if row.quantity.name != "main kernel")
    assert len(found.rows) == len(book.QUANTITIES) and found.belongs == "beside"


def test_of_a_backward_the_main_kernel_is_compared_beside_the_whole_call():
    work = Workload(1, 2, 512, 128, "bf16", direction="backward")
    found = predict(work, schedule="fa3", device="h200")
    assert book.compare(found, measured(found)).row("main kernel").measured is None
    kernels = tuple((name, cycles * 1.1) for name, cycles in found.kernels)
    taken = measured(found)
    run = replace(taken, measurement=replace(taken.measurement, kernels=kernels))
    (row,) = (row for row in book.compare(found, run).rows if row.quantity.name == "main kernel")
    assert row.predicted == max(cycles for _, cycles in found.kernels) and row.error == pytest.approx(1 / 1.1 - 1)
    assert book.compare(found, run).kernel == "fa3 backward"


@pytest.mark.parametrize(
    ("kernel", "head_dim", "schedule"),
    [
        ("peer:fa4", 128, "fa3"),
        ("peer:fa4", 256, "narrow"),
        ("peer:fa2", 64, "fa2"),
        ("peer:cudnn", 128, "cudnn"),
        ("peer:cudnn", 256, None),
        ("lagged", 64, "lagged"),
    ],
)
def test_the_schedule_of_a_backward_that_stands_for_a_kernel(predicted, kernel, head_dim, schedule):
    work = Workload(1, 2, 512, head_dim, "bf16", direction="backward")
    whose = "cuda" if kernel == "lagged" else "peer"
    run = replace(measured(predicted, implementation=whose), workload=work, schedule=kernel)
    assert book.counterpart("a run", run, None)[0] == schedule


def test_errors_are_relative_and_of_shares_in_points(predicted):
    found = book.compare(predicted, measured(predicted, slower=1.25))
    assert found.row("cycles").error == pytest.approx(-0.2, abs=1e-4)
    assert found.row("time").error == pytest.approx(-0.2, abs=1e-4)
    assert found.row("throughput").error == pytest.approx(0.25, abs=1e-4)
    share = found.row("tensor cores")
    assert share.error == pytest.approx(share.predicted - share.predicted / 1.25, abs=1e-4)


def test_what_was_not_measured_has_no_error_and_does_not_enter_the_means(predicted):
    run = measured(predicted)
    run = replace(run, activity=replace(run.activity, tensor=None), traffic=replace(run.traffic, l2_hit_rate=None))
    found = book.compare(predicted, run)
    assert found.row("tensor cores").error is None and found.row("L2 hit rate").error is None
    columns = {column.quantity.name: column for column in book.Report((found,)).columns("beside")}
    assert columns["tensor cores"].count == 0 and columns["tensor cores"].mape is None
    assert columns["cycles"].count == 1


def test_writes_are_compared_up_to_the_end_of_the_kernel_as_counters_see_them(predicted):
    """O of a small problem stays dirty in L2: no counter sees it written, and the model says as much."""
    assert predicted.traffic.dirty_bytes == predicted.traffic.total("hbm_write") > 0
    run = measured(predicted)
    none = replace(run.traffic.by_tensor["all"], hbm_write=0)
    found = book.compare(predicted, replace(run, traffic=replace(run.traffic, by_tensor={"all": none}, dirty_bytes=None)))
    assert found.row("HBM written").predicted == 0 and found.row("HBM written").error == 0.0
    large = predict(Workload(4, 16, 4096), schedule="pingpong", device="h200").traffic
    assert 0 < large.dirty_bytes < 30 << 20 < large.total("hbm_write")


def test_each_run_belongs_to_one_table(predicted):
    assert book.compare(predicted, measured(predicted)).belongs == "beside"
    assert book.compare(predicted, measured(predicted), after=True).belongs == "after"
    for others in (measured(predicted, "pytorch"), measured(predicted, "peer"), measured(predicted, "callable")):
        assert book.compare(predicted, others, after=True).belongs == "others"
    for aside in (
        measured(predicted, "triton"), measured(predicted, l2="warm"), measured(predicted, regime="burst"),
        measured(predicted, "peer", regime="burst"), replace(measured(predicted), schedule="fa3"),
    ):  # fmt: skip
        assert book.compare(predicted, aside).belongs == "aside"


def test_two_runs_that_do_not_belong_together_are_refused(predicted):
    with pytest.raises(UsageError, match="predicted and a measured"):
        book.compare(predicted, predicted)
    with pytest.raises(UsageError, match="the prediction is of"):
        book.compare(predicted, replace(measured(predicted), workload=Workload(1, 4, 2048)))


# -- a folder ---


def fake_predict(asked: list):
    def answer(workload, schedule, device, tile, **_):
        asked.append((schedule, device, tile))
        return predict(workload, schedule=schedule, device=device, tile=tile)

    return answer


def test_each_run_is_predicted_with_its_own_tile_and_on_its_own_device(predicted):
    tile = Tile(128, 128, 2, 2)
    asked: list = []
    odd = replace(measured(predicted), workload=Workload(1, 4, 1100), tile=Tile(128, 128, 2, 2, 2))
    book.compare_all({"a": replace(measured(predicted), tile=tile), "b": odd}, predict=fake_predict(asked))
    assert asked == [("pingpong", "h200", tile), ("pingpong", "h200", tile)]  # 9 Q tiles do not pair up: no cluster


def test_kernels_that_are_not_ours_stand_beside_their_schedule_or_are_listed_without(predicted):
    asked: list = []
    tile = Tile(128, 176, 2, 2, 1)
    others = {
        "fa3": replace(measured(predicted, "peer"), schedule="peer:fa3", tile=tile),
        "fa2": replace(measured(predicted, "peer"), schedule="peer:fa2", tile=None),
        "cudnn": replace(measured(predicted, "pytorch"), schedule="torch-cudnn", tile=None),
        "triton": replace(measured(predicted, "triton"), schedule="fa2", tile=None),
    }
    report = book.compare_all(others, predict=fake_predict(asked))
    assert [(each[0], each[2]) for each in asked] == [("fa3-published", tile), ("fa2-pytorch", None), ("fa2", None)]
    assert [len(report.of(which)) for which in ("beside", "after", "others", "aside")] == [0, 0, 3, 1]
    assert list(report.kernels("others")) == ["peer:fa2 fp16", "peer:fa3 fp16", "torch-cudnn fp16"]
    (cudnn,) = (each for each in report.comparisons if each.name == "cudnn")
    assert cudnn.predicted is None and "no schedule stands for torch-cudnn" in cudnn.note
    assert cudnn.row("cycles").measured and cudnn.row("cycles").error is None and cudnn.largest is None
    assert report.columns("others")[0].count == 2  # the third is listed and enters no mean
    assert book.compare_all({"cudnn": others["cudnn"]}, schedule="fa3").comparisons[0].predicted.schedule == "fa3"
    split = replace(others["fa2"], measurement=replace(others["fa2"].measurement, kernels=(("flash_fwd_splitkv_kernel<>", 9.0),)))
    assert book.compare_all({"a": split}).comparisons[0].predicted is None
    theirs = {"mine": replace(measured(predicted, "callable"), schedule="my:f", tile=None)}
    with pytest.raises(UsageError, match="--schedule"):
        book.compare_all(theirs)
    assert book.compare_all(theirs, schedule="fa3").comparisons[0].predicted.schedule == "fa3"


def test_a_gpu_without_a_model_must_be_given_one(predicted):
    with pytest.raises(UsageError, match="--device"):
        book.compare_all({"a": replace(measured(predicted), device="NVIDIA GH200")})
    with pytest.raises(UsageError, match="predicted; compare takes measured"):
        book.compare_all({"a": predicted})


def test_the_tables_are_scored_apart(predicted):
    runs = {"a": measured(predicted), "b": measured(predicted, slower=1 / 0.9), "c": measured(predicted, slower=1 / 0.7)}
    runs["d"] = replace(measured(predicted, "peer", slower=1 / 0.5), schedule="peer:fa3")
    report = book.compare_all(runs, after={"c"}, predict=lambda **_: predicted)
    error = {which: report.columns(which)[0] for which in ("beside", "after", "others", "aside")}
    assert error["beside"].mape == pytest.approx(0.05, abs=1e-3) and error["beside"].worst_run == "b"
    assert error["after"].mape == pytest.approx(0.3, abs=1e-3) and error["after"].count == 1
    assert error["others"].mape == pytest.approx(0.5, abs=1e-3) and error["aside"].count == 0
    assert report.worst.name == "c"


def test_schedules_are_ranked_as_on_the_hardware_where_they_differ():
    runs = {name: predict(WORK, schedule=name, device="h200") for name in ("pingpong", "fa3", "warp-specialized")}
    order = sorted(runs, key=lambda name: runs[name].cycles / runs[name].sm_clock_hz)
    fast, middle, slow = (runs[name] for name in order)

    def rank(*factors: float) -> book.Ranking:
        pairs = zip((fast, middle, slow), factors, strict=True)
        return book.rank([book.compare(run, measured(run, slower=factor)) for run, factor in pairs])

    alike = rank(1.0, 1.0, 1.0)
    assert alike.reversed == ()
    turned = rank(2.0, 1.0, 1.0)
    assert turned.pairs >= 2 and len(turned.reversed) == 2
    assert order[0] in turned.reversed[0] and "predicted the other way" in turned.reversed[0]


# -- what is said ---


def test_the_explanation_names_waiting_where_the_work_is_the_same(predicted):
    run = measured(predicted, slower=1.3)
    found = book.compare(predicted, run)
    assert found.largest.quantity.name == "cycles"
    assert "same work" in found.explanation and "wait" in found.explanation
    assert "Time is -23.1% off" in found.explanation


def test_the_explanation_names_work_where_the_tensor_cores_do_more(predicted):
    run = measured(predicted, slower=1.5)
    run = replace(run, activity=replace(run.activity, tensor=run.activity.tensor + 0.5 * predicted.cycles * 132))
    assert "tensor-core work" in book.compare(predicted, run).explanation


def test_the_explanation_of_bytes_counts_in_compulsory_ones(predicted):
    run = measured(predicted)
    total = replace(run.traffic.by_tensor["all"], hbm_read=3 * WORK.compulsory_read_bytes)
    found = book.compare(predicted, replace(run, traffic=replace(run.traffic, by_tensor={"all": total})))
    assert "3.00 times measured" in found.explanation


@pytest.mark.parametrize("name", ["SM clock", "L2 read", "L2 hit rate", "tensor cores", "MUFU", "issue slots"])
def test_every_cause_has_its_sentence(predicted, name):
    found = book.compare(predicted, measured(predicted, slower=1.1))
    row = found.row(name)
    assert explanation._REASONS[row.quantity.name](found)


def test_without_counters_there_is_still_an_explanation_of_time(predicted):
    run = measured(predicted, slower=1.2)
    nothing = Bytes(None, None, None, None, None, None)
    bare = replace(
        run, power_w=None, activity=replace(run.activity, tensor=None, mufu=None, issue=None),
        traffic=replace(run.traffic, by_tensor={"all": nothing}, l2_hit_rate=None),
    )  # fmt: skip
    assert "without a counter of the tensor cores" in book.compare(predicted, bare).explanation


# -- the command ---


@pytest.fixture
def folder(tmp_path, predicted):
    others = (replace(measured(predicted, "peer"), schedule=name, tile=None) for name in ("peer:cudnn", "peer:fa2"))
    for run in (measured(predicted, slower=1.1), *others):
        store.save(run, tmp_path / store.file_name(run))
    return tmp_path


def test_the_command_prints_errors_means_and_the_largest_disagreement(fasim, folder):
    status, out, err = fasim("compare", str(folder))
    assert (status, err) == (0, "")
    assert "our kernels, beside which the model was made, 1 run" in out and "other people's kernels, 2 runs" in out
    assert "-9.1 %" in out and "no schedule" in out and "all that have a schedule" in out and "largest disagreement" in out
    answer = json.loads(fasim("compare", str(folder), "--json")[1])
    assert sorted(run["set"] for run in answer["runs"]) == ["beside", "others", "others"]
    assert set(answer["columns"]) == {"beside", "after", "others", "aside"}
    assert answer["columns"]["beside"][0]["mape"] == pytest.approx(0.0909, abs=1e-3)
    assert set(answer["kernels"]["others"]) == {"peer:cudnn fp16", "peer:fa2 fp16"}
    assert "unseen" not in json.dumps(answer)


def test_without_paths_the_tables_are_of_what_came_with_the_source(fasim, folder, monkeypatch):
    for name in ("RECORDED", "BLIND", "PEERS"):
        place = folder / name
        place.mkdir()
        path = next(folder.glob("peer-fa2*" if name == "PEERS" else "pingpong*"))
        (place / f"{name}.run.json").write_text(path.read_text())
        monkeypatch.setattr(store, name, place)
    answer = json.loads(fasim("compare", "--json")[1])
    assert {run["name"]: run["set"] for run in answer["runs"]} == {"RECORDED": "beside", "BLIND": "after", "PEERS": "others"}


def test_one_file_shows_every_quantity(fasim, folder):
    (path,) = folder.glob("pingpong*")
    status, out, _ = fasim("compare", str(path))
    assert status == 0
    assert all((quantity.name in out) == (quantity.name != "main kernel") for quantity in book.QUANTITIES)


def test_a_file_that_no_schedule_stands_for_shows_what_was_measured(fasim, folder):
    (path,) = folder.glob("peer-cudnn*")
    status, out, _ = fasim("compare", str(path))
    assert status == 0 and "missing" in out and "no schedule stands for peer:cudnn" in out


def test_the_markdown_is_a_table_for_each_set(fasim, folder):
    lines = fasim("compare", str(folder), "--markdown")[1].splitlines()
    assert lines[0] == "**Our kernels, beside which the model was made** (1 runs, NVIDIA H200, 2026-11-21)"
    assert lines[4].startswith("| pingpong | 1 | 9.1 % | -9.1 % |")
    assert "| peer:cudnn fp16 | 1 | no schedule | - |" in "\n".join(lines)
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert len(set(tables)) == 1


@pytest.mark.parametrize("tokens", [("nowhere",), (".",), ("broken.run.json",)])
def test_what_cannot_be_compared_is_one_sentence(fasim, tmp_path, monkeypatch, tokens):
    monkeypatch.chdir(tmp_path)
    if tokens[0].startswith("broken"):
        (tmp_path / tokens[0]).write_text('{"schema": "fasim.recorded-run/9"}')
    status, out, err = fasim("compare", *tokens)
    assert (status, out, err.count("\n")) == (2, "", 1)


# -- measure, without a GPU ---


def test_measure_without_a_gpu_says_what_is_missing_and_exits_3(fasim):
    torch = pytest.importorskip("torch", reason="without torch that is what is missing", exc_type=ImportError)
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status, out, err = fasim("measure", "fa2", "--seqlen", "512")
    assert (status, out) == (3, "") and err.startswith("fasim: measuring needs an NVIDIA GPU") and err.count("\n") == 1


def test_measure_without_torch_says_what_to_install_and_exits_3(fasim, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    status, out, err = fasim("measure", "fa2", "--counters")
    assert (status, out) == (3, "") and "pip install 'fasim[kernels]'" in err


@pytest.mark.parametrize(
    "tokens", [("measure",), ("measure", "fa2", "--plan", "p.toml"), ("measure", "--plan", "p.toml"),
               ("measure", "--plan", "p.toml", "--out", "runs")],
)  # fmt: skip
def test_measure_with_contradictory_options_is_one_sentence(fasim, tmp_path, monkeypatch, tokens):
    monkeypatch.chdir(tmp_path)
    status, out, err = fasim(*tokens)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["measure", "compare", "doctor"])
def test_help_teaches(fasim, command):
    status, out, err = fasim(command, "--help")
    assert (status, err) == (0, "")
    assert f"Example: fasim {command}" in out and "Theory:" in out
