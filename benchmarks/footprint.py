"""What the core costs before it does anything: install size, the time of ``--help``, and a server with a stub provider;
and what fifty installed plugins add to it that nothing names.

    make bench-footprint

Installs the core alone into an environment of its own, so it needs a package index. Medians of five runs.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = 5
PLUGINS = 50
IMPORT_SECONDS = 0.1
"""How long each of the plugins that nothing names would take to import."""
HEAVY = ("numpy", "pandas", "torch")
SERVER = f"""
import sys
HEAVY = {HEAVY}
from llama_stack.distribution import Distribution
from llama_stack.plugins import discover
from llama_stack.registry import Registry
from llama_stack.server import serve
from llama_stack.stack import Stack
from llama_stack.testing.stub_inference import stub

distribution = Distribution.model_validate(
    dict(version=1, name="footprint", providers=dict(inference=[dict(provider="stub")]), server=dict(port=0))
)
stack = Stack(distribution, Registry(discover([stub])))
def announce(url):
    print(url, ",".join(m for m in HEAVY if m in sys.modules) or "none", flush=True)
sys.exit(serve(stack, on_ready=announce))
"""


def install(folder: Path) -> tuple[Path, float, int]:
    """A fresh environment with the core: its Python, the megabytes and the packages that the core added."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    before = measure(folder, python)
    command = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", ROOT]
    subprocess.run([str(word) for word in command], check=True, stderr=subprocess.DEVNULL)
    after = measure(folder, python)
    return python, after[0] - before[0], after[1] - before[1]


def measure(folder: Path, python: Path) -> tuple[float, int]:
    packages = next(folder.glob("lib/python3*/site-packages"))
    size = sum(file.stat().st_size for file in packages.rglob("*") if file.is_file()) / 1e6
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    return size, len(listed.stdout.splitlines())


def help_seconds(python: Path) -> float:
    began = time.perf_counter()
    subprocess.run([python.with_name("llama-stack"), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def server(python: Path) -> tuple[float, float, str]:
    """Seconds from the start to the first 200 of readiness, its megabytes then, and what heavy it imported."""
    began = time.perf_counter()
    command = [str(python), "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        url, heavy = process.stdout.readline().split()
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health/ready", timeout=5):
                    break
            except urllib.error.HTTPError:
                time.sleep(0.005)
        seconds = time.perf_counter() - began
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        process.terminate()
        process.wait(30)
    return seconds, int(found[1]) / 1000, heavy


def add_plugins(folder: Path) -> None:
    """Install plugins that nothing names, each with a provider and a command, and each slow to import."""
    packages = next(folder.glob("lib/python3*/site-packages"))
    for number in range(PLUGINS):
        (packages / f"slow_plugin_{number}.py").write_text(f"import time\ntime.sleep({IMPORT_SECONDS})\n")
        info = packages / f"slow_plugin_{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: slow-plugin-{number}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[llama_stack]\nslow-{number} = slow_plugin_{number}\n")


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        python, megabytes, packages = install(Path(folder) / "venv")
        help_seconds(python)
        helps = [help_seconds(python) for _ in range(RUNS)]
        server(python)
        starts = [server(python) for _ in range(RUNS)]
        add_plugins(Path(folder) / "venv")
        help_seconds(python)
        more_helps = [help_seconds(python) for _ in range(RUNS)]
        server(python)
        more_starts = [server(python) for _ in range(RUNS)]
    median_help, median_start = statistics.median(helps), statistics.median(s for s, _, _ in starts)
    print(f"{'what':44} {'measured':>10} {'goal':>8}")
    rows = [
        ("core install, MB", f"{megabytes:.0f}", "70"),
        ("core install, packages", str(packages), "35"),
        ("llama-stack --help, s", f"{median_help:.2f}", "0.4"),
        ("server with a stub, ready after, s", f"{median_start:.2f}", "1.2"),
        ("server with a stub, resident, MB", f"{statistics.median(m for _, m, _ in starts):.0f}", "80"),
        (f"of {', '.join(HEAVY)} imported", starts[-1][2], "none"),
        (f"{PLUGINS} plugins more: --help, s", f"{statistics.median(more_helps) - median_help:+.2f}", "0.2"),
        (
            f"{PLUGINS} plugins more: ready after, s",
            f"{statistics.median(s for s, _, _ in more_starts) - median_start:+.2f}",
            "0.2",
        ),
    ]
    for what, measured, goal in rows:
        print(f"{what:44} {measured:>10} {goal:>8}")


if __name__ == "__main__":
    main()
