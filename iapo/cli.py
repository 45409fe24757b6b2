"""The command line: one function a subcommand, each a few lines that call the module of the same name.

Modules are imported inside the commands, so that `iapo --help` imports neither torch nor pandas.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="iapo",
    help="Inference-aware preference optimization: fine-tune a language model for the way it will be used.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failure, 2 a user's mistake, 130 Ctrl-C; a traceback with --debug."""
    from iapo.errors import UserError

    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments)
    except KeyboardInterrupt:
        code, message = 130, "interrupted; what was computed is kept, run the same command again to go on"
    except UserError as error:
        code, message = 2, str(error)
    except Exception as error:  # the last resort: one line for a person, the traceback on request
        code, message = 1, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    else:
        return
    if debug:
        traceback.print_exc()
    print(f"iapo: {message}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(code) if code == 130 else sys.exit(code)


if __name__ == "__main__":
    main()
