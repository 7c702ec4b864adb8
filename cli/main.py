"""The ``rsq-stream`` command: commands are wired here, errors end here."""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from rsq_stream import __version__
from rsq_stream.errors import Interrupted, RsqError

from .commands.demo import demo
from .commands.doctor import doctor
from .commands.eval import evaluate_model
from .commands.inspect import inspect
from .commands.plan import plan
from .commands.quantize import quantize
from .commands.status import status
from .commands.sweep import sweep
from .commands.verify import verify
from .options.common import Debug
from .options.quantize_options import takes_options
from .signals import INTERRUPTED

COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": takes_options(quantize),
    "plan": takes_options(plan),
    "status": status,
    "inspect": inspect,
    "verify": verify,
    "eval": evaluate_model,
    "sweep": sweep,
    "demo": demo,
    "doctor": doctor,
}
_QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""An error is one line: nothing that we import may add its own."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends in SystemExit, as console scripts expect."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    if not debug:
        for name, value in _QUIET_LIBRARIES.items():
            os.environ.setdefault(name, value)
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
    make_app(debug=debug)(args=given, prog_name="rsq-stream")


def make_app(*, debug: bool) -> typer.Typer:
    """Wire the commands together, each within the error boundary."""
    app = typer.Typer(
        name="rsq-stream",
        help="Quantize LLMs that do not fit the machine, one block at a time.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global_options)
    for name, command in COMMANDS.items():
        app.command(name)(bounded(command, debug=debug))
    return app


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"rsq-stream {__version__}")
        raise typer.Exit
    return wanted


def _global_options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version.", callback=_version, is_eager=True
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    del show_version, debug  # main looks for --debug wherever it stands


def bounded(command: Callable[..., None], *, debug: bool) -> Callable[..., None]:
    """Turn every error of a command into one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*values: Any, **options: Any) -> None:
        try:
            command(*values, **options)
        except (KeyboardInterrupt, Exception) as error:
            if debug or isinstance(error, _CONTROL):
                raise
            line, code = explained(error)
            typer.echo(line, err=True)
            raise typer.Exit(code) from None

    return run


_CONTROL = (typer.Exit, typer.Abort, BrokenPipeError)


def explained(error: BaseException) -> tuple[str, int]:
    """Return the one line and the exit code of an error."""
    text = " ".join(str(error).splitlines())
    if isinstance(error, Interrupted):
        return text, INTERRUPTED
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same command goes on where it can", INTERRUPTED
    if isinstance(error, RsqError):
        return f"error: {text}", 1
    hint = "run again with --debug for the traceback, please report"
    return f"error: {type(error).__name__}: {text}; {hint}", 1
