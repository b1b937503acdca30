"""How much a process's memory grows over a piece of work, mapped pages included."""

import subprocess
import sys
import textwrap

PEAK = """
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""


def growth(prepare, work, *arguments):
    """Bytes that ``work`` adds to the peak of a new process that has run ``prepare``; both are code."""
    code = "\n".join(
        [PEAK, textwrap.dedent(prepare), "before = peak()", textwrap.dedent(work), "print(peak() - before)"]
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
