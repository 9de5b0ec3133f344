"""``python -m kerneltest.worker``: read a message a line, answer a line, until the input ends."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import traceback
from typing import TextIO

from kerneltest.model.messages import NOT_THE_KERNELS
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
    """Answer until the input ends. An error that no kernel is to blame for ends the process by a status of its own."""
    worker = Worker()
    for line in requests:
        try:
            answer = worker.answer(json.loads(line))
        except Exception:
            traceback.print_exc()
            # Where the device's context is lost, whatever is raised next is the kernel's doing.
            sys.exit(NOT_THE_KERNELS if worker.device_answers else 1)
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
