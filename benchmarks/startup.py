"""What the plugin costs a project that does not use it: ``python benchmarks/startup.py [runs]``.

Two figures: importing the plugin into a process that has pytest already, and whole pytest processes in an empty folder,
with the plugin and with ``-p no:kerneltest``, in turn. Medians, in milliseconds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

IMPORT = """
import time, pytest
start = time.perf_counter()
import kerneltest.plugin
seconds = time.perf_counter() - start
import sys
ours = sorted(name for name in sys.modules if name.split(".")[0] in ("kerneltest", "torch", "hypothesis"))
print(seconds, *ours)
"""


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    imports, processes = [], {"with": [], "without": []}
    loaded: set[str] = set()
    with tempfile.TemporaryDirectory() as empty:
        for _ in range(runs):
            done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=empty)
            seconds, *names = done.stdout.split()
            imports.append(float(seconds))
            loaded.update(names)
            for name, options in (("with", []), ("without", ["-p", "no:kerneltest"])):
                start = time.perf_counter()
                command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
                subprocess.run(command, capture_output=True, check=False, cwd=empty)
                processes[name].append(time.perf_counter() - start)
    medians = {name: 1000 * statistics.median(times) for name, times in processes.items()}
    print(f"import of the plugin: {1000 * statistics.median(imports):.2f} ms; loads {', '.join(sorted(loaded))}")
    print(
        f"pytest in an empty folder: {medians['with']:.0f} ms with it, {medians['without']:.0f} ms without, {runs} runs"
    )


if __name__ == "__main__":
    main()
