"""The front door: `flawsmith --help`. A command a stage, and a few for what lies around them.

    pipeline.py  the stages        registry.py  promotion
    use.py       predict, serve    house.py     check, doctor, fetch, params

Nothing heavy is imported before a command needs it: help answers at once, and `predict` runs where torch is missing.
Exit status: 0 done, 1 failed (or a quality gate said no), 2 the input cannot be used as it is, 3 found what was looked
for (a defect, a drift), 130 interrupted.
"""

import logging
import os
import sys
import traceback
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from flawsmith import __version__
from flawsmith.cli.common import app
from flawsmith.errors import INTERRUPTED, FlawsmithError, refusal

__all__ = ["app", "main"]

DEBUG = "FLAWSMITH_DEBUG"
LONGEST_REASON = 400  # characters of an unexpected error that are shown; torch writes pages

for _file in ("pipeline", "use", "registry", "house"):  # each adds its commands, in this order in the help
    import_module(f"flawsmith.cli.{_file}")


def main() -> None:
    """Run the command line; whatever goes wrong ends in one sentence on stderr and an exit status."""
    try:
        try:
            app(prog_name="flawsmith")
        finally:
            _flush()
    except FlawsmithError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted.", INTERRUPTED)
    except Exception as error:
        from flawsmith.extras import explain

        if refused := refusal(error) or explain(error):
            _fail(str(refused), refused.exit_code)
        reason = " ".join(str(error).split())
        shown = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
        _fail(
            f"unexpected {type(error).__name__}{f': {shown}' if shown else ''} "
            f"(set {DEBUG}=1 to see where it happened).",
            FlawsmithError.exit_code,
        )


def _flush() -> None:
    """What is still to be printed is written now, where an error can be told."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again at its end
        raise


def _fail(sentence: str, exit_code: int) -> NoReturn:
    if os.environ.get(DEBUG):
        traceback.print_exc()
    print("flawsmith: " + " ".join(sentence.split()), file=sys.stderr)
    sys.exit(exit_code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _front(
    _version: Annotated[  # eager: answered before a missing command is complained of
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    logger = logging.getLogger("flawsmith")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
