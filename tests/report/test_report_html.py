"""compress.report.pages: the page in a browser, and the pictures' coordinates."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
import sample_report

from compress.report import charts
from compress.report.pages import figure, grids, percent, quarters, render, size
from compress.report.report import KlDivergence, TensorReport
from compress.report.words import amount

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import screenshot

CHROMIUM = next(filter(None, map(shutil.which, screenshot.BROWSERS)), "")
browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium")

# Appended to a page for the test: writes the browser's measurements into the page.
LOOK = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(e =>
    !e.closest(".wrap") && !e.closest("svg") &&
    e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80));
  const pictures = [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    return {title: svg.querySelector("title").textContent, width: box.width, height: box.height,
            marks: svg.querySelectorAll("rect, circle, polygon, polyline").length};
  });
  const out = parent.document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify({
    inner: innerWidth, scroll: document.documentElement.scrollWidth, wide, pictures,
    requests: performance.getEntriesByType("resource").map(e => e.name),
    background: getComputedStyle(document.body).backgroundColor,
    title: document.title, scripts: document.scripts.length,
    images: document.images.length, text: document.body.innerText});
  parent.document.body.append(out);
});</script>"""


def look(page: str, folder: Path, width: int = 1200, *flags: str) -> tuple[dict[str, Any], str]:
    """The browser's measurements of a page, and its console output.

    In a frame of the wanted width: Chromium's own windows are at least 500 wide.
    """
    path = folder / "page.html"
    frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{escape(page + LOOK)}">'
    path.write_text(f'<meta charset="utf-8"><body>{frame}</iframe>', encoding="utf-8")
    command = [
        CHROMIUM,
        *screenshot.FLAGS,
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1300,1000",
        *flags,
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert seen, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(unescape(seen[1])), "\n".join(console)


@browser
@pytest.mark.parametrize("width", [1200, 375])
def test_the_page_in_a_browser(tmp_path: Path, width: int) -> None:
    seen, console = look(render(sample_report.make()), tmp_path, width)
    assert console == ""
    assert seen["inner"] == width
    assert seen["scroll"] <= width and seen["wide"] == []
    assert seen["requests"] == []
    titles = [picture["title"] for picture in seen["pictures"]]
    assert titles == [
        "File size against mean KL divergence, one mark per artifact",
        "Bytes of each artifact",
        *(f"Bits per weight by block, {name}" for name in
          ("GGUF Q4_K_M", "ONNX int4-g32", "Core ML lut4-g8")),
        "KL divergence by scored tokens",
        "KL divergence by place in the window",
        "Tokens per second, prefill",
        "Tokens per second, decode",
        "Memory of each artifact",
    ]  # fmt: skip
    for picture in seen["pictures"]:
        assert picture["width"] > 300 and picture["height"] > 80
        assert picture["marks"] >= 3
    for words in (
        "✕ Failed",
        "0.0297 ± 0.0025",
        "llama.cpp (xllamacpp 2026.10.11549)",
        "640.00 MB",
    ):
        assert words in re.sub(r"\s+", " ", seen["text"])


@browser
def test_these_checks_can_fail(tmp_path: Path) -> None:
    page = render(sample_report.make(artifacts=1)).replace(
        "</body>",
        '<script>console.error("ouch")</script><img src="http://a.invalid/x.png">'
        '<p style="width: 600px; max-width: none">wide</p></body>',
    )
    seen, console = look(page, tmp_path, 375)
    assert len(seen["wide"]) == 1 and seen["scroll"] > 375
    assert "ouch" in console
    assert seen["requests"] == ["http://a.invalid/x.png"]


@browser
def test_dark(tmp_path: Path) -> None:
    page = render(sample_report.make(artifacts=1))
    light, _ = look(page, tmp_path, 1200, "--blink-settings=preferredColorScheme=1")
    dark, _ = look(page, tmp_path, 1200, "--blink-settings=preferredColorScheme=0")
    assert light["background"] == "rgb(250, 249, 246)"
    assert dark["background"] == "rgb(18, 19, 22)"


@browser
def test_strings_of_a_checkpoint_stay_strings(tmp_path: Path) -> None:
    evil = '"><script>document.title="owned"</script><img src=x onerror=alert(1)>'
    report = sample_report.make(evil, notes=(evil,), command=evil)
    for artifact in report.artifacts:
        sample_report.change(artifact, type=evil, runtime=evil, notes=[evil])
        artifact.generation.text = artifact.generation.prompt_text = evil
        sample_report.change(artifact.gates[0], name=evil, limit=evil)
        for tensor in artifact.tensors:
            sample_report.change(tensor, name=evil, note=evil, grid=evil)
    report.recipe["name"] = report.baseline.runtime = report.baseline.text = evil
    sample_report.change(report.model, source=evil, license=evil, family=evil)
    page = render(report)
    assert evil not in page
    seen, console = look(page, tmp_path, 375)
    assert console == ""
    assert seen["title"] == f"{evil} – packlight report"
    assert seen["scripts"] == 1 and seen["images"] == 0  # the one of this test
    assert seen["wide"] == []
    assert evil in seen["text"]


def test_no_address_is_ever_loaded() -> None:
    page = render(sample_report.make())
    assert not re.search(r"https?:|//[a-z]|@import|src=|url\(", page)
    assert page == render(sample_report.make())  # same report, same page


def test_not_verified() -> None:
    page = render(sample_report.make(verified=False))
    assert "○ Not verified" in page
    assert 'id="speed"' not in page and 'id="bytes"' in page and 'id="depth"' in page


def test_passed_and_no_gates() -> None:
    page = render(sample_report.make(gates={}, budget_bytes=None))
    assert "✓ Passed" in page and "the recipe has no gates" in page
    assert 'id="gates"' not in page and "budget" not in page.split("</style>")[1]
    assert "all 3 gates passed" in render(sample_report.make(gates={"kl_divergence": "<=1"}))


def test_figures_that_are_not_there() -> None:
    report = sample_report.make()
    for artifact in report.artifacts:
        artifact.kl_divergence = KlDivergence()
        for key in ("kl_along_text", "kl_by_position"):
            getattr(artifact, key).mean[3:9] = [None] * 6
        for key in ("perplexity", "perplexity_ratio", "top1_agreement", "peak_memory_bytes",
                    "peak_anonymous_bytes", "startup_memory_bytes"):  # fmt: skip
            setattr(artifact, key, None)
        artifact.nonfinite_tokens = 9
        artifact.generation_consistent = False
        sample_report.change(
            artifact.generation, first_difference=4, gap=1.5, spread=2.0, text=None
        )
    sample_report.change(
        report.baseline, prefill_tokens_per_second=None, decode_tokens_per_second=None
    )
    page = render(report)
    assert "logits were not finite at 9 of 8176 tokens" in page
    assert "token 5 of 32 is another; its logit is 1.5 higher" in page
    assert "nan" not in page.lower().split("</style>")[1].replace("nantes", "")
    assert 'id="quality"' not in page


def test_colours_can_be_told_from_their_ground() -> None:
    """WCAG contrast: 4.5 for words, 3 for marks, in both themes."""
    css = (Path(charts.__file__).parent / "report.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in css.split("@media")[:2]
    )
    assert light.keys() == dark.keys()
    for theme in (light, dark):
        for ground in ("card", "page"):
            for word in ("ink", "soft", "pass", "fail", "c0", "c1", "c2", "c3", "c4", "c5"):
                assert contrast(theme[word], theme[ground]) > 4.5, word
            assert contrast(theme["float"], theme[ground]) > 3
        for name in ("pass", "fail", "wait"):
            assert contrast(theme[name], theme[f"{name}-back"]) > 4.5
            assert contrast(theme["ink"], theme[f"{name}-back"]) > 7


def contrast(one: str, other: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio"""

    def luminance(colour: str) -> float:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        r, g, b = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


# --- pictures by arithmetic ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 1, 4, [0, 0.25, 0.5, 0.75, 1]),
        (0, 0.073, 4, [0, 0.02, 0.04, 0.06, 0.08]),
        (590, 760, 4, [550, 600, 650, 700, 750, 800]),
        (0, 0, 4, [0]),
        (3, 3, 4, [3]),
    ],
)
def test_ticks(low: float, high: float, count: int, expected: list[float]) -> None:
    assert charts.ticks(low, high, count) == pytest.approx(expected)


def test_bars_are_as_long_as_their_values() -> None:
    rows = [
        charts.Bar("a", "", [(30.0, "c0"), (10.0, "rest")]),
        charts.Bar("b", "", [(80.0, "c1")]),
    ]
    svg = charts.bars([charts.Group("", rows)], "t", "axis")
    found = [float(width) for width in re.findall(r'width="([\d.]+)" height="9"', svg)]
    assert found[0] / found[2] == pytest.approx(30 / 80, abs=0.01)
    assert found[1] / found[2] == pytest.approx(10 / 80, abs=0.01)
    assert found[2] == pytest.approx(388 * 80 / 80, abs=0.1)


def test_marks_stand_where_their_figures_say() -> None:
    points = [charts.Point("a", "c0", 5e8, 0.02, None), charts.Point("b", "c3", 6e8, 0.04, 0.001)]
    svg = charts.scatter(points, "t", 0.03, None)
    (x1, y1), (x2, y2) = (
        (float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    )
    assert x1 < x2 and y2 < y1
    assert 240 - y2 == pytest.approx(2 * (240 - y1), abs=0.2)  # twice the KL, twice the height
    gate = re.search(r'y1="([\d.]+)" x2="386" y2="\1" class="limit"', svg)
    assert gate and float(gate[1]) == pytest.approx((y1 + y2) / 2, abs=0.2)


def test_labels_of_close_marks_do_not_overlap() -> None:
    points = [charts.Point(f"name {i}", f"c{i}", 5e8 + i, 0.02, None) for i in range(6)]
    svg = charts.scatter(points, "t", None, None)
    found = re.findall(r'x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" class="name', svg)
    assert len(found) == 6
    boxes = []
    for x, y, anchor in found:
        start = float(x) if anchor == "start" else float(x) - 6 * 7
        boxes.append((start, start + 6 * 7, float(y)))
    for one, other in itertools.combinations(boxes, 2):
        assert one[1] < other[0] or other[1] < one[0] or abs(one[2] - other[2]) >= 13.9


def test_a_label_leaves_the_numbers_of_the_axis_alone() -> None:
    points = [
        charts.Point("ONNX int4-g32", "c1", 805_690, 0.63, 0.022),
        charts.Point("Core ML int4-g32", "c2", 830_150, 0.628, 0.022),
        charts.Point("GGUF Q4_K_M", "c0", 857_150, 0.354, 0.012),
    ]
    svg = charts.scatter(points, "t", 0.2, None)
    left = min(float(x) for x in re.findall(r'<line x1="([\d.]+)"[^>]*class="grid"', svg))
    found = re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="(\w+)" class="name[^>]*>([^<]+)', svg)
    assert len(found) == 3
    for x, anchor, name in found:
        assert float(x) - (len(name) * 7 if anchor == "end" else 0) >= left


def test_a_gate_far_away_does_not_squeeze_the_points() -> None:
    points = [charts.Point("a", "c0", 5e8, 0.02, None), charts.Point("b", "c3", 6e8, 0.04, None)]
    svg = charts.scatter(points, "t", 0.4, 5e9)
    assert "gate 0.4, above" in svg and 'class="limit"' not in svg
    heights = [240 - float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', svg)]
    assert max(heights) > 100


def test_curves_break_where_nothing_is_known() -> None:
    svg = charts.curves([charts.Curve("a", "c0", [1.0, 2.0, None, 3.0, 1.0])], "t", "axis", 50)
    assert svg.count("<polyline") == 2
    assert charts.runs([None, None]) == []


def test_depth_has_a_cell_per_tensor() -> None:
    tensors = [
        TensorReport(name=f"t{i}", block=i, role="q_proj", grid="Q4_K", shape=[4, 4], bytes=9,
                     bits_per_weight=4.5 + i)
        for i in range(3)
    ]  # fmt: skip
    head = {"name": "head", "role": "lm_head", "grid": "Q8_0", "bits_per_weight": 8.5}
    norm = TensorReport(name="norm", role="norm", grid="F32", shape=[4], bytes=16,
                        bits_per_weight=32)  # fmt: skip
    svg = charts.depth([*tensors, TensorReport(**head, shape=[8, 4], bytes=34), norm], "t")
    assert svg.count('class="cell"') == 4
    tones = [float(tone) for tone in re.findall(r'fill-opacity="([\d.]+)"', svg)]
    assert tones[0] < tones[1] < tones[2] < tones[3] <= 1
    assert "<title>t1: Q4_K, 5.5 bits</title>" in svg


def test_words_for_numbers() -> None:
    assert str(figure(0.031234, 0.00112)) == ('0.0312 <span class="error">± 0.0011</span>')
    assert str(figure(12.3456, 1.6)) == '12.3 <span class="error">± 1.6</span>'
    assert str(figure(1234.5, 160.0)) == '1234 <span class="error">± 160</span>'
    assert str(figure(5.4321)) == "5.432"
    assert str(figure(None)) == str(size(None)) == str(percent(None)) == amount(None) == "–"
    assert str(percent(0.93791, 0.0027)) == (
        '<span class="unit">93.79 <span class="error">± 0.27</span> %</span>'
    )
    assert str(size(1932735283)) == (
        '<span class="unit">1.93 GB</span> <span class="unit error">(1.80 GiB)</span>'
    )
    assert [amount(value) for value in (0.01234, 1.23456, 12345.6, 2048.0)] == [
        "0.0123",
        "1.235",
        "12,346",
        "2,048",
    ]


def test_grids_are_summed() -> None:
    artifact = sample_report.make().artifacts[0]
    rows = grids(artifact)
    assert sum(row["bytes"] for row in rows) == artifact.weights_bytes
    assert sum(row["tensors"] for row in rows) == len(artifact.tensors)
    assert {row["grid"]: row["bits"] for row in rows} == pytest.approx(
        {"Q4_K": 4.5, "Q6_K": 6.5625, "F32": 32}, rel=1e-6
    )


def test_quarters() -> None:
    assert quarters([1.0, 3.0, None, None, 5.0, None, 7.0, 9.0]) == [2.0, None, 5.0, 8.0]
    assert quarters([1.0]) == [None, None, None, 1.0]
