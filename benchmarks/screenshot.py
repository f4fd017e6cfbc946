"""Renews docs/report.png, the picture of a report in the README, and those of docs/gallery.md.

    python benchmarks/screenshot.py [REPORT.html --output PICTURE.png]

Builds the bundled checkpoint in all three formats, and a batch of three recipes. With a
report, only that one's picture is taken. Needs Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "report.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (  # a browser of one page, without a profile, a GPU or the network
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
WIDTH, HEIGHT = 1200, 603  # CSS pixels: as far as below the table of artifacts


# Picture of docs/gallery.md → whose page, and its height.
GALLERY = {
    ROOT / "docs" / "report-page.png": ("report", 3015),
    ROOT / "docs" / "batch-page.png": ("batch", 2170),
}
JOBS = """\
schema: 1
output: shelf
models: [{model: "%s", name: demo}]
recipes: [int4-fast, phone-4bit, small-4bit]
"""


def batch_page(folder: Path) -> Path:
    """Build the bundled checkpoint with three recipes; the path of ``batch.html``."""
    (folder / "jobs.yaml").write_text(JOBS % (ROOT / "compress" / "demo" / "model"))
    subprocess.run(
        [sys.executable, "-m", "compress", "batch", "-q", "jobs.yaml"], cwd=folder, check=True
    )
    return folder / "shelf" / "batch.html"


def demo_report(folder: Path) -> Path:
    """Build and verify the bundled checkpoint; the path of its ``report.html``."""
    subprocess.run(
        [sys.executable, "-m", "compress", "demo", "-q", "--output", "demo"], cwd=folder, check=True
    )
    return folder / "demo" / "report.html"


def screenshot(page: Path, picture: Path, browser: str, height: int = HEIGHT) -> None:
    """Write the top of ``page`` as a PNG of ``WIDTH`` x ``height`` pixels, without the network."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser,
                *FLAGS,
                "--hide-scrollbars",
                f"--user-data-dir={profile}",
                f"--window-size={WIDTH},{height}",
                f"--screenshot={picture.resolve()}",
                page.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("report", type=Path, nargs="?", help="report.html; default: of the demo")
    parser.add_argument("--output", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"error: none of {', '.join(BROWSERS)} on the PATH")
    if arguments.report:
        screenshot(arguments.report, arguments.output, browser)
        print(f"{arguments.output}: {arguments.output.stat().st_size / 1000:.0f} kB")
        return
    with tempfile.TemporaryDirectory() as folder:
        pages = {"report": demo_report(Path(folder)), "batch": batch_page(Path(folder))}
        screenshot(pages["report"], arguments.output, browser)
        for picture, (page, height) in GALLERY.items():
            screenshot(pages[page], picture, browser, height)
    for picture in (arguments.output, *GALLERY):
        print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
