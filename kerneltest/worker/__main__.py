"""``python -m kerneltest.worker``: read a message a line, answer a line, until the input ends."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from typing import TextIO

from kerneltest.worker.serve import Worker


def main() -> None:
    # Whatever a library prints belongs to stderr, which the parent keeps; the protocol has a descriptor of its own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # A process that dies does not flush: what a kernel printed last is worth most then.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # A dying process names the Python line that it was in, and so does a hanging one when it is asked.
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    serve(sys.stdin, answers)


def serve(requests: TextIO, answers: TextIO) -> None:
    worker = Worker()
    for line in requests:
        answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
