"""The `lme` command: a list of commands, each of which imports its work when it runs."""

import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lme_cli.commands import config, convert, data, doctor, evaluate, generate, kernels, train
from lme_cli.commands.unshard import unshard
from lme_cli.commands.verify_resume import verify_resume


class ErrorsAsMessages(TyperGroup):
    """The one place where errors become a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:  # typer's own context class is private
        """Run a command; 0 done, 1 failed, 2 wrong run file or wrong usage, 130 interrupted."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise typer.Exit(1) from None
        except Exception as error:
            from lme_cli.errors import describe, exit_code, is_for_the_user

            if not is_for_the_user(error):
                raise
            if ctx.params.get("show_traceback"):
                traceback.print_exc()
            print(describe(error), file=sys.stderr)
            raise typer.Exit(exit_code(error)) from None


app = typer.Typer(
    name="lme",
    cls=ErrorsAsMessages,
    help="Pretrain, finetune and distil language models; `lme train` alone trains a small one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        from lme_cli import __version__

        print(f"lme {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error was raised.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and stop.", is_eager=True, callback=_show_version
        ),
    ] = False,
) -> None:
    """Take the options that stand before the command; `ErrorsAsMessages` reads them."""


app.command()(train.train)
app.command()(train.pretrain)
app.command()(train.finetune)
app.command()(train.distill)
app.command()(unshard)
app.command()(generate.generate)
app.command()(evaluate.evaluate)
app.add_typer(config.app, name="config")
app.add_typer(convert.app, name="convert")
app.add_typer(data.app, name="data")
app.add_typer(kernels.app, name="kernels")
app.command()(doctor.doctor)
app.command("verify-resume")(verify_resume)


def main() -> None:
    """Run the `lme` command with the process's arguments."""
    try:
        app(prog_name="lme")
    except SystemExit as ended:
        leave_group(ended.code)
        raise
    except BaseException:
        if not _is_in_group():
            raise
        traceback.print_exc()
        leave_group(1)


def leave_group(code: object) -> None:
    """End a process that is one of several at once; others go on.

    The others must not wait for this one to clean up, and some versions of torch abort when they
    do. What is written was flushed, synced and closed by those who wrote it.
    """
    if _is_in_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _is_in_group() -> bool:
    # Nobody who did not load this module can be in a group.
    launch = sys.modules.get("lme_parallel.launch")
    return launch is not None and launch.detect(os.environ).world_size > 1
