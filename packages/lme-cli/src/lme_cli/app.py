"""The `lme` command: a list of commands, each of which imports its work when it runs."""

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lme_cli.commands import config, convert, data, doctor, evaluate, generate, kernels, train
from lme_cli.commands.unshard import unshard


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


def main() -> None:
    """Run the `lme` command with the process's arguments."""
    app(prog_name="lme")
