"""The report as a page: complete, self-contained, and fit to be seen in a browser."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cvxq.summary import summarize
from cvxq_converter.job import convert
from cvxq_converter.options import ConversionOptions
from cvxq_converter.write.details import (
    LIMIT,
    Distribution,
    losses_by_position,
    weight_distributions,
)
from cvxq_converter.write.page import write_report
from cvxq_converter.write.page.axes import Axis
from cvxq_converter.write.page.charts import percent
from cvxq_converter.write.page.tables import byte_parts, depth_map, flat

Save = Callable[..., Path]
CASES: dict[str, dict[str, Any]] = {
    "target": {"max_kl": 0.2, "sequences": 16, "length": 24},
    "increase": {"max_perplexity_increase": 0.2, "sequences": 16, "length": 24},
    "none": {"bits": 4.0, "calibration": "none"},
    "rtn": {"bits": 4.0, "method": "rtn"},
}
VOID = {"meta", "link", "br", "path", "circle", "rect"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def reports(save_network: Save, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of reports, one per case."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder, model = tmp_path_factory.mktemp("reports"), str(save_network("llama"))
    for name, chosen in CASES.items():
        path = folder / f"{name}.cvxq"
        options = ConversionOptions.of(group_size=16, **chosen)
        report = convert(model, path, options, with_details=True)
        write_report(folder / name, report.to_json(), summarize(path).record())
    torch.set_num_threads(threads)
    return {name: folder / name for name in CASES}


class Outline(HTMLParser):
    """Checks that elements nest, and collects texts, headings and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loads: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loads += [v or "" for n, v in attrs if n in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] in (["h1"], ["h2"]):
            self.headings.append(data)


@pytest.mark.parametrize("case", CASES)
def test_the_page_stands_alone_and_nests(case: str, reports: dict[str, Path]) -> None:
    assert sorted(p.name for p in reports[case].iterdir()) == ["index.html", "report.json"]
    text = (reports[case] / "index.html").read_text("utf-8")
    outline = Outline(text)
    assert outline.loads == ["data:,"]  # an empty icon, so that browsers do not ask for one
    assert not {"script", "img", "iframe", "object", "embed"} & set(outline.seen)
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|@import|url\(", text)
    body = text.partition("<body>")[2]
    assert not re.search(r"\b(nan|None|Undefined)\b", body)
    assert outline.seen.count("svg") >= 2


def test_every_case_shows_what_it_has(reports: dict[str, Path]) -> None:
    pages = {case: (path / "index.html").read_text("utf-8") for case, path in reports.items()}
    headings = {case: Outline(text).headings for case, text in pages.items()}
    everything = [
        "Loss over rate",
        "Weights by bit depth",
        "Mean bit depth by layer and matrix",
        "Weights against Gaussian and Laplace",
        "Loss by position",
        "Where the bytes went",
        "Where the time went",
        "The 16 matrices",
        "Provenance",
    ]
    assert headings["target"][1:] == headings["increase"][1:] == everything
    assert [h for h in everything if h not in headings["none"]] == ["Loss by position"]
    assert [h for h in everything if h not in headings["rtn"]] == [everything[0], everything[4]]


def test_the_figures_are_those_of_the_report(reports: dict[str, Path]) -> None:
    record = json.loads((reports["target"] / "report.json").read_text("utf-8"))
    text = (reports["target"] / "index.html").read_text("utf-8")
    assert f"{record['rate_bits_per_weight']:.3f} bits per weight</h1>" in text
    assert f"achieved {record['target']['achieved']:.4g}" in text
    assert f"{record['file_bytes']:,} bytes in all" in text
    assert record["file"]["provenance"]["source_sha256"] in text
    for matrix in record["file"]["matrices"]:
        assert text.count(f"{matrix['name']}: {matrix['mean_depth']:.2f} bits on average") == 1
    trials = record["details"]["curve"]["trials"]
    assert len(trials) == record["target"]["trials"] == text.count(">tried: ")


def test_a_folder_that_exists_is_written_to(reports: dict[str, Path], tmp_path: Path) -> None:
    record = json.loads((reports["none"] / "report.json").read_text("utf-8"))
    (tmp_path / "index.html").write_text("old")
    write_report(tmp_path, record, record["file"])
    assert (tmp_path / "index.html").read_bytes() == (reports["none"] / "index.html").read_bytes()


def test_a_page_that_finds_no_room_leaves_the_older_one(
    reports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(reports["none"], tmp_path / "report"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = json.loads(before["report.json"])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cvxq_format.unfinished._Named.write", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder, record, record["file"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_names_are_escaped(reports: dict[str, Path], tmp_path: Path) -> None:
    record = json.loads((reports["none"] / "report.json").read_text("utf-8"))
    record["file"]["provenance"]["source"] = "<script>alert(1)</script>"
    write_report(tmp_path, record, record["file"])
    assert "script" not in Outline((tmp_path / "index.html").read_text("utf-8")).seen


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Callable[..., str]:
    """Return a function that runs Chromium without a network and gives what it said."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")

    def run(*arguments: str) -> str:
        command = [
            *(found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", "--allow-file-access-from-files"),
            *("--proxy-server=127.0.0.1:9", "--disable-background-networking"),
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        errors = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        assert not errors, errors
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_drawn_in_either_scheme(
    scheme: str, browser: Callable[..., str], reports: dict[str, Path], tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    shot = tmp_path / "shot.png"
    preferred = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    page = (reports["target"] / "index.html").as_uri()
    browser(preferred, f"--screenshot={shot}", "--window-size=1280,1600", page)
    with image.open(shot) as opened:
        pixels = np.asarray(opened.convert("RGB")).reshape(-1, 3)
    assert len(pixels) == 1280 * 1600
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    assert len(colours) > 200
    background = colours[counts.argmax()].mean()
    assert background > 200 if scheme == "light" else background < 60
    assert 0.02 < 1 - np.sort(counts)[-2:].sum() / len(pixels) < 0.5  # neither blank nor a block


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out(
    case: str, width: int, browser: Callable[..., str], reports: dict[str, Path], tmp_path: Path
) -> None:
    """A frame of that width holds the page without scrolling sideways; its text is readable."""
    frame = tmp_path / "frame.html"
    page = (reports[case] / "index.html").as_uri()
    frame.write_text(
        f'<iframe id="f" src="{page}" width="{width}" height="800"></iframe><pre id="p"></pre>'
        "<script>onload = () => { const d = f.contentDocument, e = d.documentElement;"
        "const sizes = [...d.querySelectorAll('svg text')].map(t =>"
        " parseFloat(getComputedStyle(t).fontSize) * t.getCTM().a);"
        "p.textContent = JSON.stringify([e.scrollWidth, e.clientWidth, Math.min(...sizes)]) }"
        "</script>",
        encoding="utf-8",
    )
    shown = re.search(r"<pre[^>]*>(.*?)</pre>", browser("--dump-dom", frame.as_uri()))
    assert shown is not None
    scroll_width, client_width, smallest = json.loads(shown[1])
    assert scroll_width <= client_width
    assert client_width > width - 20
    assert smallest >= 8  # pixels


# --- what the page is made of -------------------------------------------------------------------


def test_axes_have_round_ticks() -> None:
    linear = Axis(0, 0.0831, 218, 14)
    assert [tick.label for tick in linear.ticks()] == ["0.00", "0.02", "0.04", "0.06", "0.08"]
    assert linear.at(0) == 218
    assert linear.at(0.0831) == 14
    assert linear.at(1.0) == 14
    assert [t.label for t in Axis(-6, 6, 0, 100).ticks()] == ["−5", "0", "5"]
    wide = Axis(2e-5, 3.0, 218, 14, is_logarithmic=True)
    assert [t.label for t in wide.ticks()] == ["10⁻⁴", "0.001", "0.01", "0.1", "1"]
    narrow = Axis(0.9, 30.0, 218, 14, is_logarithmic=True)
    assert [t.label for t in narrow.ticks()] == ["1", "2", "5", "10", "20"]
    assert wide.at(1e-3) - wide.at(1e-2) == pytest.approx(wide.at(1e-2) - wide.at(1e-1), abs=0.11)


def test_shares_in_few_characters() -> None:
    shares = (0.0, 0.0004, 0.0006, 0.0312, 0.0996, 0.431)
    assert [percent(s) for s in shares] == ["", "", "0.1%", "3.1%", "10%", "43%"]


def test_matrices_are_arranged_by_layer() -> None:
    def matrix(name: str, depth: float) -> dict[str, Any]:
        return {"name": name, "mean_depth": depth, "pruned_share": 0.0}

    found = depth_map(
        [
            matrix("model.embed_tokens.weight", 3.0),
            matrix("model.layers.1.self_attn.q_proj.weight", 1.5),
            matrix("model.layers.0.self_attn.q_proj.weight", 2.5),
            matrix("model.layers.0.mlp.up_proj.weight", 3.5),
            matrix("lm_head.weight", 2.0),
        ]
    )
    assert found.kinds == ["q_proj", "up_proj"]
    assert [name for name, _ in found.rows] == ["0", "1"]
    depths = [[cell and cell.mean_depth for cell in cells] for _, cells in found.rows]
    assert depths == [[2.5, 3.5], [1.5, None]]
    assert [name for name, _ in found.others] == ["embed_tokens", "lm_head"]
    assert (found.low, found.high) == (1, 4)
    assert [cell.heat for _, cell in found.others] == [66.7, 33.3]


def test_parts_of_a_file_add_up() -> None:
    parts = byte_parts({"header": 10, "codes": 85, "scales": 5})
    assert [(part.key, part.percent) for part in parts] == [
        ("codes", 85.0),
        ("scales", 5.0),
        ("header", 10.0),
    ]
    assert flat({"a": {"b": 1, "c": None}, "d": [1, 2], "e": []}) == [("a.b", "1"), ("d", "1, 2")]


def test_positions_are_pooled() -> None:
    loss = np.arange(200.0).reshape(2, 100)
    runs = losses_by_position(loss)
    assert len(runs) == 32
    assert runs[0].first == 0
    assert runs[-1].last == 99
    assert all(a.last + 1 == b.first for a, b in pairwise(runs))
    values = loss[:, runs[3].first : runs[3].last + 1]
    assert runs[3].kl == values.mean()
    assert runs[3].standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(values.size))
    assert [r.kl for r in losses_by_position(np.ones((1, 3)))] == [1.0, 1.0, 1.0]


def test_gaussian_weights_are_found_to_be_gaussian(save_network: Save) -> None:
    """Gaussian in every group, of another spread in each: by matrix, tails are heavier."""
    from cvxq_converter.allocate.plan import make_plans
    from cvxq_converter.source.checkpoint import open_source
    from cvxq_converter.source.loaded import load_model

    options = ConversionOptions.of(bits=3.0, group_size=32, means=False)
    loaded = load_model(open_source(str(save_network("llama", hidden_size=128))), options)
    generator = torch.Generator().manual_seed(0)
    for weight in loaded.originals.values():
        weight.normal_(generator=generator)
        weight *= torch.exp2(torch.randn(weight.shape[1], generator=generator))
    plans = make_plans(loaded, {}, options.method)
    by_group, by_matrix = weight_distributions(plans, lambda p: loaded.originals[p.matrix.name])
    assert by_group.kurtosis == pytest.approx(3, rel=0.1)
    assert by_matrix.kurtosis > 5
    for found in (by_group, by_matrix):
        assert isinstance(found, Distribution)
        assert sum(found.density) * 2 * LIMIT / len(found.density) == pytest.approx(1, abs=0.01)
    middle = by_group.density[len(by_group.density) // 2]
    assert middle == pytest.approx(1 / np.sqrt(2 * np.pi), rel=0.03)
