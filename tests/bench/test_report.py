from __future__ import annotations

import json
import subprocess

import pytest

from bigkernels.bench import engine, report


@pytest.fixture
def rows(make_case, limits, settings):
    return [row for backward in (False, True) for row in engine.run(make_case(backward=backward), limits, settings)]


@pytest.fixture
def document(rows, limits, settings):
    return report.document(rows, limits, settings, "bigkernels bench tiny")


def test_json_holds_what_the_figures_depend_on(document, tmp_path):
    path = tmp_path / "new folder" / "out.json"
    report.write_json(path, document)
    read = json.loads(path.read_text())
    assert read == json.loads(json.dumps(document))
    assert read["schema"] == report.SCHEMA
    assert read["command"] == "bigkernels bench tiny"
    assert read["date"].endswith("+00:00")
    assert {"cpu", "gpus", "memory", "versions", "libraries"} == set(read["machine"])
    assert {"model", "isa", "threads", "features"} <= set(read["machine"]["cpu"])
    assert read["machine"]["versions"]["torch"]
    assert read["limits"]["copy"] == 1e9
    assert read["settings"]["rounds"] == 3
    assert [(r["candidate"], r["backward"], r["status"]) for r in read["rows"]] == [
        (name, backward, status)
        for backward in (False, True)
        for name, status in (("eager", "ok"), ("bigkernels", "ok"), ("peer", "missing"))
    ]
    timed = read["rows"][0]
    assert set(timed["seconds"]) == {"median", "q1", "q3", "least", "rounds"}
    assert timed["seconds"]["q1"] <= timed["seconds"]["median"] <= timed["seconds"]["q3"]


def test_commit_is_that_of_the_checkout():
    root = report.Path(report.__file__).parents[2]
    found = report.commit()
    if not (root / ".git").exists():
        assert found is None
    else:
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert found.removesuffix("+changes") == head


def test_tables_show_figures_and_name_what_is_missing_or_wrong(rows, capsys):
    rows[1].status, rows[1].reason, rows[1].seconds = "wrong", "out0: error 1, allowed 0.1", None
    report.print_rows("tiny: a title", rows)
    printed = capsys.readouterr().out
    assert "tiny: a title" in printed
    assert "glu 4x32, float32, forward + backward" in printed
    assert "WRONG" in printed
    assert "bigkernels in glu 4x32 float32 forward: WRONG, not timed: out0: error 1, allowed 0.1" in printed
    assert printed.count("peer: missing, made for another device than cpu") == 1


def test_units():
    assert [report.duration(s) for s in (2.0, 0.0123, 4.5e-6)] == ["2 s", "12.3 ms", "4.5 us"]
    assert [report.size(n) for n in (999, 1500, 2_000_000, 3_500_000_000)] == ["999 B", "1.5 kB", "2 MB", "3.5 GB"]


def test_plots_are_written_for_each_family(document, tmp_path):
    plots = pytest.importorskip("bigkernels.bench.plots")
    document["rows"] += [row | {"family": "small", "metric": "us"} for row in document["rows"]]
    document["rows"] += [
        row | {"family": "attention", "metric": "TFLOP/s", "tflops": 0.5} for row in document["rows"] if row["seconds"]
    ]
    document["rows"].append(document["rows"][0] | {"family": "nobody ran", "seconds": None, "status": "wrong"})
    paths = plots.write(document, tmp_path / "plots")
    assert [path.name for path in paths] == ["tiny.png", "small.png", "attention.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_what_has_another_unit_or_direction_has_an_axis_of_its_own(document):
    plots = pytest.importorskip("bigkernels.bench.plots")
    timed = [row for row in document["rows"] if row["seconds"]]
    rows = [row | {"backward": None} for row in timed] + timed
    rows += [row | {"metric": "TFLOP/s", "tflops": 0.5, "case": "products"} for row in timed if row["backward"]]
    axes = plots._figure("linear", rows, document).axes
    assert [a.get_title(loc="left") for a in axes] == ["forward", *["forward + backward"] * 2, "step"]
    assert [a.get_xlabel().split()[0] for a in axes] == ["GB/s", "GB/s", "TFLOP/s", "GB/s"]


def test_plot_labels_do_not_overlap(document):
    plots = pytest.importorskip("bigkernels.bench.plots")
    timed = [row for row in document["rows"] if row["seconds"]]
    # Many cases with long names, far apart in value: the worst that the families have.
    rows = [
        row | {"case": f"4096x{2**n} + residual", "gbps": 0.01 * 4**n, "limit_percent": 0.1 * 4**n}
        for n in range(8)
        for row in timed
    ]
    figure = plots._figure("rms_norm", rows, document)
    figure.canvas.draw()
    for axes in figure.axes:
        labels = [label.get_window_extent() for label in axes.get_yticklabels()]
        texts = [text.get_window_extent() for text in axes.texts]
        assert len(labels) == 8
        assert len(texts) == 16
        for boxes in (labels, texts):
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
