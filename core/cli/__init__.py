"""The command line: `holdfast COMMAND`. One file a command; this one loads them when they are called."""

from __future__ import annotations

import importlib
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from holdfast import __version__
from holdfast.errors import ExitCode, HoldfastError, InterruptedRun

# command -> the module of this package that defines it, in the order of the work
COMMANDS = (
    "run",
    "prune",
    "recover",
    "sensitivity",
    "calibrate",
    "export",
    "quantize",
    "verify",
    "serve",
    "bench",
    "inspect",
    "suites",
)


class LazyGroup(click.Group):
    """Imports a command's module when the command is used, so that `--help` stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"holdfast.cli.{cmd_name}_command")
        command = module.command
        assert isinstance(command, click.Command)
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(_debug_option())
        return command


def _debug_option() -> click.Option:
    """`--debug` is read from the arguments by `run_cli`, so that it works before and after the command."""
    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error."
    )


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="holdfast")
def cli() -> None:
    """Compress an aligned language model to ONNX, and prove that its safety behaviour survived.

    Exit codes: 0 verified or done, 1 error, 2 usage, 3 verification failed, 4 inconclusive,
    130 interrupted.
    """


cli.params.append(_debug_option())


def main() -> NoReturn:
    """Entry point of the `holdfast` script: every failure becomes one sentence and an exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run_cli(sys.argv[1:]))


def run_cli(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    debug = "--debug" in arguments
    try:
        result = cli.main(arguments, prog_name="holdfast", standalone_mode=False)
        return int(result) if isinstance(result, int) else ExitCode.VERIFIED
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort, InterruptedRun) as error:
        return _fail(
            str(error) or "Interrupted: nothing was left half-written; run the same command again.",
            ExitCode.INTERRUPTED,
        )
    except HoldfastError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except Exception as error:
        if debug:
            raise
        return _fail(
            f"Unexpected {type(error).__name__}: {' '.join(str(error).split())} "
            "(this is a fault of Holdfast: run again with --debug and report it).",
            ExitCode.ERROR,
        )


def _fail(message: str, code: ExitCode) -> int:
    click.echo(f"holdfast: {message}", err=True)
    return int(code)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
