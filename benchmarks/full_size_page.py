"""Limits, tables and the picture of ``full_size.py``'s measurements.

MB and GB are powers of ten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

# Uses internal names: draws as the report does.
from compress.report.charts import element, line, text, ticks

MB, GB = 1e6, 1e9
BUSY = 0.1  # CPU seconds of others per second of wall time, from which on a machine is not idle
PEER = "llama.cpp:f16"  # what all of llama.cpp's types begin with
HERE = Path(__file__).resolve().parent
PICTURE = HERE.parent / "docs" / "scaling.svg"
DOCS = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
TOLD = "phi-3-mini-4k"  # whose bars these are


@dataclass(frozen=True)
class Family:
    """One family's measurements; a missing row is a KeyError."""

    name: str
    facts: Mapping[str, Any]

    def __call__(self, row: str, what: str) -> float:
        return float(self.facts["rows"][row][what])

    def cpu(self, *rows: str) -> float:
        """CPU seconds of some rows together."""
        return sum(self(row, "cpu_seconds") for row in rows)

    def wall(self, *rows: str) -> float:
        """Wall seconds of some rows together."""
        return sum(self(row, "wall_seconds") for row in rows)


@dataclass(frozen=True)
class Bar:
    """A limit on a figure.

    Attributes:
        value: of a family, in the unit.
        rows: from which it is computed.
        goal: a stricter limit; 0: none.
        idle: a wall time, which is valid only on an idle machine.
    """

    what: str
    value: Callable[[Family], float]
    rows: tuple[str, ...]
    limit: float
    unit: str = "×"
    goal: float = 0.0
    idle: bool = False


def part_of_peer(kind: str, limit: float, goal: float) -> Bar:
    """packlight's CPU time over that of converting and quantizing."""
    ours, peers = f"gguf:{kind}", (PEER, f"llama.cpp:{kind}")
    return Bar(
        f"GGUF {kind}: CPU, ours / llama.cpp's convert + quantize",
        lambda f: f.cpu(ours) / f.cpu(*peers),
        (ours, *peers),
        limit,
        goal=goal,
    )


def part_of_gguf(row: str, limit: float) -> Bar:
    """CPU time of a format over that of packlight's Q4_K_M."""
    return Bar(
        f"{row}: CPU / our Q4_K_M",
        lambda f: f.cpu(row) / f.cpu("gguf:Q4_K_M"),
        (row, "gguf:Q4_K_M"),
        limit,
    )


def peak(row: str, what: str, limit: float, unit: str = "MB") -> Bar:
    """A peak of memory."""
    kinds = {
        "peak_anonymous": "anonymous",
        "peak_resident": "resident",
        "main_resident": "float model's",
    }
    scale = {"MB": MB, "GB": GB}[unit]
    return Bar(f"{row}: {kinds[what]} peak", lambda f: f(row, what) / scale, (row,), limit, unit)


def wall_minutes(row: str, limit: float) -> Bar:
    """Minutes that a row takes."""
    return Bar(f"{row}: wall", lambda f: f.wall(row) / 60, (row,), limit, "min", idle=True)


def seconds_of_sum(what: str) -> Bar:
    """Three targets at once beside one after the other."""
    single = ("gguf:Q4_K_M", "onnx:int4-g32", "coreml:int4-g32")
    name = {"cpu_seconds": "CPU", "wall_seconds": "wall"}[what]

    def value(f: Family) -> float:
        return f("all", what) / (sum(f(row, what) for row in single) - 2 * f("read", what))

    rows = ("all", *single, "read")
    return Bar(
        f"three in one build: {name} / (sum - 2 reads)", value, rows, 1.15, idle=name == "wall"
    )


GGUF = ("gguf:Q4_0", "gguf:Q4_K_M", "gguf:IQ4_XS")
ONNX = ("onnx:int4-g32", "onnx:int4-g128")
COREML = ("coreml:int4-g32", "coreml:lut4-g16")
BARS = (
    part_of_peer("Q4_K_M", 1 / 3.5, 1 / 5),
    part_of_peer("IQ4_XS", 1 / 8, 1 / 12),
    part_of_peer("Q4_0", 1 / 1.3, 1 / 2),
    *(
        Bar(f"{row}: wall / CPU", lambda f, r=row: f.wall(r) / f.cpu(r), (row,), 0.65, idle=True)
        for row in GGUF
    ),
    *(peak(row, "peak_anonymous", 400) for row in GGUF),
    *(peak(row, "peak_resident", 1.0, "GB") for row in GGUF),
    *(part_of_gguf(row, 0.5) for row in ONNX),
    *(peak(row, "peak_anonymous", 350) for row in ONNX),
    part_of_gguf("coreml:int4-g32", 0.8),
    part_of_gguf("coreml:lut4-g16", 2.5),
    *(peak(row, "peak_anonymous", 700) for row in COREML),
    *(
        Bar(
            f"{row}: disk while writing / disk at the end",
            lambda f, r=row: f(r, "peak_disk") / f(r, "final_disk"),
            (row,),
            1.01,
        )
        for row in COREML
    ),
    Bar(
        # SHA256SUMS reads the written files back, from disk if they are no longer in the page
        # cache. Without that, one reading of the shards is at most 1, and two are more than 1.1.
        "three in one build: from disk, less the files' bytes / bytes of the checkpoint",
        lambda f: (f("all", "from_disk") - f("all", "bytes")) / f.facts["checkpoint_bytes"],
        ("all",),
        1.05,
    ),
    seconds_of_sum("cpu_seconds"),
    seconds_of_sum("wall_seconds"),
    peak("verify:gguf", "main_resident", 2.5, "GB"),
    peak("verify", "peak_resident", 3.0, "GB"),
    wall_minutes("verify", 12),
    peak("calibrated", "peak_resident", 2.5, "GB"),
    wall_minutes("calibrated", 45),
    peak("gptq", "peak_resident", 3.0, "GB"),
    Bar("gptq: CPU", lambda f: f.cpu("gptq"), ("gptq",), 3000, "s"),
    wall_minutes("gptq", 180),
)


def judged(family: Family) -> list[dict[str, Any]]:
    """The bars whose rows have been measured."""
    found = []
    for bar in BARS:
        try:
            value = bar.value(family)
        except KeyError:
            continue
        rows = [family.facts["rows"][row] for row in bar.rows]
        busy = any(row["others_seconds"] > BUSY * row["wall_seconds"] for row in rows)
        # Other processes lengthen a row: the wall time of one row is an upper bound; ratios of
        # several rows are meaningless.
        verdict = "pass" if value <= bar.limit else "**fail**"
        if bar.idle and busy and (len(rows) > 1 or value > bar.limit):
            verdict = "not idle"
        found.append(
            {
                "what": bar.what,
                "value": round(value, 3),
                "limit": round(bar.limit, 3),
                "goal": round(bar.goal, 3),
                "unit": bar.unit,
                "verdict": verdict,
                "one_run": len({row["run"] for row in rows}) == 1,
            }
        )
    return found


# --- Markdown ---------------------------------------------------------------------------------

HEAD = """# Full-size checkpoints: what packing takes

Written by `benchmarks/full_size.py`; how to run it, where the time goes and what the limits are is
in docs/performance.md. Checkpoints of `make_checkpoint.py`, bf16, random weights. {processor},
{cores} cores, {memory:.0f} GB. MB and GB are powers of ten; *anonymous* and *resident* are peaks
over all processes; every row begins with the checkpoint out of the page cache, *from disk* is what
came from there; *disk* is the most room taken at a time. *Others' CPU* is
what everything else on the machine took meanwhile: where that is much, wall time says little, and
CPU time wanders by some 20 %. Bars are those of phi-3-mini-4k: of smaller models, start and
imports are a good part.
"""
BAR_HEAD = ("bar", "measured", "limit", "goal", "")
ROW_HEAD = (
    "row", "CPU s", "ns per weight", "wall s", "anonymous MB", "resident MB", "from disk GB",
    "written GB", "disk GB", "files GB", "others' CPU s", "run",
)  # fmt: skip


def page(document: Mapping[str, Any]) -> str:
    """All families: rows as measured, then the bars."""
    machine = document["machine"]
    lines = [
        HEAD.format(
            processor=machine["processor"],
            cores=machine["cores"],
            memory=machine["memory_bytes"] / GB,
        )
    ]
    for name, facts in document["families"].items():
        family = Family(name, facts)
        sparse = "; sparse shards of zeros, whose time is that of zeros" if facts["sparse"] else ""
        lines += [
            f"## {name}",
            "",
            f"{facts['parameters'] / 1e9:.2f} billion parameters, "
            f"{facts['checkpoint_bytes'] / GB:.2f} GB in {facts['shards']} file(s){sparse}.",
            "",
            *table(ROW_HEAD, [shown(family, key) for key in facts["rows"]]),
            "",
        ]
        if rows := judged_rows(family):
            lines += [*table(BAR_HEAD, rows), ""]
    return "\n".join(lines)


def digest(family: Family) -> str:
    """The family of the bars in short, for docs/performance.md."""
    keys = [key for key in family.facts["rows"] if key != "gptq:1"]  # one block
    columns = (0, 1, 3, 4, 5, 9)
    rows = [[shown(family, key)[column] for column in columns] for key in keys]
    head = [ROW_HEAD[column] for column in columns]
    return "\n".join([*table(head, rows), "", *table(BAR_HEAD, judged_rows(family))])


def judged_rows(family: Family) -> list[tuple[str, ...]]:
    """``judged`` as a table."""
    return [
        (
            bar["what"] + ("" if bar["one_run"] else " (of several runs)"),
            f"{number(bar['value'])} {bar['unit']}",
            f"{number(bar['limit'])}",
            number(bar["goal"]) if bar["goal"] else "",
            bar["verdict"],
        )
        for bar in judged(family)
    ]


def shown(family: Family, key: str) -> tuple[str, ...]:
    """A row of the first table."""
    row = family.facts["rows"][key]
    per_weight = (
        "" if key == "gptq:1" else f"{1e9 * row['cpu_seconds'] / family.facts['parameters']:.1f}"
    )
    gigabytes = (f"{row[size] / GB:.2f}" for size in ("from_disk", "written", "peak_disk", "bytes"))
    return (
        key,
        f"{row['cpu_seconds']:.1f}",
        per_weight,
        f"{row['wall_seconds']:.1f}",
        f"{row['peak_anonymous'] / MB:.0f}",
        f"{row['peak_resident'] / MB:.0f}",
        *gigabytes,
        f"{row['others_seconds']:.0f}",
        row["run"],
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others numbers."""
    lines = ["|" + " | ".join(head) + "|", "|---|" + "--:|" * (len(head) - 1)]
    return lines + ["|" + " | ".join(row) + "|" for row in rows]


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


# --- the picture ------------------------------------------------------------------------------

SERIES = {  # rows whose CPU seconds add up; their memory is the largest
    "llama.cpp Q4_K_M": ((PEER, "llama.cpp:Q4_K_M"), "#8a8a8a"),
    "GGUF Q4_K_M": (("gguf:Q4_K_M",), "#1f6feb"),
    "ONNX int4-g32": (("onnx:int4-g32",), "#d9730d"),
    "Core ML int4-g32": (("coreml:int4-g32",), "#2da44e"),
}
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 400, 250, 46, 30, 36
STYLE = "text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}polyline{fill:none;stroke-width:2}"


def picture(families: Sequence[Family]) -> Markup:
    """CPU time per weight and peak memory against the number of weights."""

    def cpu(family: Family, rows: Sequence[str]) -> float:
        return 1e9 * family.cpu(*rows) / family.facts["parameters"]

    def memory(family: Family, rows: Sequence[str]) -> float:
        return max(family(row, "peak_anonymous") for row in rows) / MB

    parts = [
        element("style", Markup(STYLE)),
        element("rect", width=2 * WIDTH, height=HEIGHT + 24, fill="#fff"),
        panel(families, cpu, "CPU, ns per weight", 0),
        panel(families, memory, "anonymous memory, MB", WIDTH),
        *(legend(index, name) for index, name in enumerate(SERIES)),
    ]
    title = "CPU time per weight and peak memory of packing, by size of the model"
    size = f"0 0 {2 * WIDTH} {HEIGHT + 24}"
    return element(
        "svg", element("title", title), *parts, xmlns="http://www.w3.org/2000/svg", viewBox=size
    )


def panel(
    families: Sequence[Family],
    value: Callable[[Family, Sequence[str]], float],
    heading: str,
    shift: int,
) -> Markup:
    """One diagram: weights on a logarithmic axis."""
    sizes = [family.facts["parameters"] / 1e9 for family in families]
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, (rows, _) in SERIES.items():
        for family, size in zip(families, sizes, strict=True):
            if all(row in family.facts["rows"] for row in rows):
                lines.setdefault(name, []).append((size, value(family, rows)))
    marks = ticks(0.0, max(y for points in lines.values() for _, y in points))
    low, high = math.log(min(sizes) * 0.8), math.log(max(sizes) * 1.25)

    def across(size: float) -> float:
        return LEFT + (math.log(size) - low) / (high - low) * (WIDTH - LEFT - 10)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - y / marks[-1] * (HEIGHT - BOTTOM - TOP)

    drawn = [text(LEFT, 16, heading)]
    for mark in marks:
        drawn.append(line(LEFT, down(mark), WIDTH - 10, down(mark), "grid"))
        drawn.append(text(LEFT - 5, down(mark) + 4, f"{mark:g}", "end"))
    drawn += [text(across(size), HEIGHT - 18, f"{size:.1f} B", "middle") for size in sizes]
    for name, points in lines.items():
        places = [(across(size), down(y)) for size, y in points]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(element("polyline", points=joined, stroke=SERIES[name][1]))
        drawn += [element("circle", cx=x, cy=y, r=3, fill=SERIES[name][1]) for x, y in places]
    return element("g", *drawn, transform=f"translate({shift} 0)")


def legend(index: int, name: str) -> Markup:
    """The legend below both diagrams."""
    x = LEFT + index * 180
    mark = element("rect", x=x, y=HEIGHT + 2, width=12, height=12, fill=SERIES[name][1])
    return element("g", mark, text(x + 18, HEIGHT + 12, name))


def write_pages(document: Mapping[str, Any], folder: Path) -> None:
    """The Markdown beside the JSON; the picture and the table of docs/performance.md."""
    (folder / "full_size.md").write_text(page(document), encoding="utf-8")
    families = [Family(name, facts) for name, facts in document["families"].items()]
    told = [family for family in families if family.name == TOLD]
    if told and folder == HERE:
        text_now = DOCS.read_text(encoding="utf-8")
        before, _, rest = text_now.partition(BEGIN)
        after = rest.partition(END)[2]
        new = f"{before}{BEGIN}\n{digest(told[0])}\n{END}{after}"
        DOCS.write_text(new, encoding="utf-8")
    measured = [family for family in families if "gguf:Q4_K_M" in family.facts["rows"]]
    if len(measured) > 1 and folder == HERE:
        measured.sort(key=lambda family: float(family.facts["parameters"]))
        PICTURE.write_text(str(picture(measured)) + "\n", encoding="utf-8")
