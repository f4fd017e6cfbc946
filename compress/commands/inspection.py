"""Output of ``packlight inspect`` and ``packlight fit``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.console import Console, format_bytes
from compress.errors import UsageError


def print_all(described: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the facts of artifacts or a checkpoint; ``-v`` lists the tensors."""
    console.result(described[0] if len(described) == 1 else described)
    for number, facts in enumerate(described):
        if number:
            console.data("")
        print_facts(facts, console)


def print_facts(facts: Mapping[str, Any], console: Console) -> None:
    """Print keys and values, aligned, and the table of tensors when verbose."""
    head: dict[str, Any] = {
        "name": facts["name"],
        "format": facts["format"],
        "architecture": facts["architecture"],
        "parameters": f"{facts['parameters']:,}" if facts["parameters"] else "unknown",
        "size": format_bytes(facts["bytes"]),
    }
    if facts.get("bits_per_weight"):
        head["bits per weight"] = f"{facts['bits_per_weight']:.3f}"
    grids: dict[str, int] = {}
    for tensor in facts["tensors"]:
        grids[tensor["grid"]] = grids.get(tensor["grid"], 0) + 1
    head["tensors"] = ", ".join(f"{count} {grid}" for grid, count in sorted(grids.items()))
    rows = head | {shorten(key): value for key, value in facts["metadata"].items()}
    width = max(map(len, rows))
    for key, value in rows.items():
        console.data(f"{key.ljust(width)}  {shorten(value)}")
    if console.verbose:
        console.data("")
        console.table(
            ["tensor", "shape", "grid", "bytes"],
            [
                [row["name"], "×".join(map(str, row["shape"])), row["grid"], f"{row['bytes']:,}"]
                for row in facts["tensors"]
            ],
        )


def shorten(value: Any, limit: int = 100) -> str:
    """One printable line of bounded length: metadata may hold templates and token lists."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


PARTS = {
    "weights": "weights_bytes",
    "KV cache": "kv_cache_bytes",
    "activations": "activation_bytes",
}


def print_fit(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print a block per artifact: its memory, then a line per device."""
    if not rows:
        raise UsageError("nothing to fit")
    for label in dict.fromkeys(row["artifact"] for row in rows):
        mine = [row for row in rows if row["artifact"] == label]
        first = mine[0]
        console.data(f"{label} at {first['context']} tokens: {format_bytes(first['total_bytes'])}")
        for part, key in PARTS.items():
            outside = part == "weights" and first["weights_outside"]
            where = ", outside the app's memory" if outside else ""
            console.data(f"  {part:<11}  {format_bytes(first[key])}{where}")
        cells = [
            [
                row["device"],
                format_bytes(row["limit_bytes"]).split(" (")[0]
                + ("" if row.get("limits_measured", True) else " ~"),
                str(row["largest_context"]),
                f"{row['tokens_per_second_bound']}" if "tokens_per_second_bound" in row else "-",
                " to ".join(f"{s:.0f}" for s in row.get("tokens_per_second_realistic", ())) or "-",
                row["verdict"],
            ]
            for row in mine
        ]
        headers = ["device", "limit", "context that fits", "tokens/s at most", "likely", "verdict"]
        console.table(headers, cells)
        if not all(row.get("limits_measured", True) for row in mine):
            console.data("~ estimated: measured on another device of the same memory, or on none")
        console.data("")
