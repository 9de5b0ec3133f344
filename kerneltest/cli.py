"""The command ``kerneltest``: what has no place in a run of pytest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import kerneltest

# A checkout has the zoo beside the package; an installation does not.
CHECKOUT_ZOO = Path(__file__).parents[1] / "tests" / "zoo" / "suites"
EXIT_CODES = """\
exit status: 0 every target met, 1 a target missed (the line on stderr names it), 2 bad arguments or a progress file
that does not fit, 3 a process died, 130 interrupted (go on with the same --resume)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status; bad arguments exit with 2 at once."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    return _power(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kerneltest", description="Tools beside the pytest plugin.")
    parser.add_argument("--version", action="version", version=f"kerneltest {kerneltest.__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    power = commands.add_parser(
        "power",
        help="measure what the oracle detects, beside the usual checkers",
        description="Run planted mistakes and correct kernels under the oracle and under the checkers in common use.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    power.add_argument("--json", type=Path, metavar="FILE", help="store the table (schema kerneltest.power/1)")
    power.add_argument("--quick", action="store_true", help="a small run that is judged by its false alarms alone")
    power.add_argument("--seed", type=_natural, default=0, metavar="N", help="same seed, same table (default: 0)")
    power.add_argument(
        "--resume", type=Path, metavar="PATH", help="keep progress in this file or folder, and go on from what is there"
    )
    power.add_argument("--jobs", type=_positive, default=2, metavar="N", help="processes (default: 2)")
    power.add_argument(
        "--zoo", type=_folder, metavar="FOLDER", help="suites of planted kernels (default: those of a checkout)"
    )
    return parser


def _power(options: argparse.Namespace) -> int:
    from kerneltest.power.command import Options, power
    from kerneltest.power.run import ProgressFileError

    zoo = options.zoo or (CHECKOUT_ZOO if CHECKOUT_ZOO.is_dir() else None)
    try:
        return power(
            Options(
                size="quick" if options.quick else "default",
                seed=options.seed,
                jobs=options.jobs,
                json=options.json,
                resume=options.resume,
                zoo=zoo,
            )
        )
    except (ProgressFileError, OSError) as error:
        sys.stderr.write(f"kerneltest power: {error}\n")
        return 2
    except BrokenProcessPool as error:
        sys.stderr.write(f"kerneltest power: a process died: {error}\n")
        return 3
    except KeyboardInterrupt:
        how = f"; go on with --resume {options.resume}" if options.resume else ""
        sys.stderr.write(f"kerneltest power: interrupted{how}\n")
        return 130


def _natural(text: str) -> int:
    return _at_least(text, 0)


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder; expected one of suites, like tests/zoo/suites")
    return path


if __name__ == "__main__":
    sys.exit(main())
