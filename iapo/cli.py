"""The command line: one function a subcommand, each a few lines that call the module of the same name.

Modules are imported inside the commands, so that `iapo --help` imports neither torch nor pandas.
"""

import logging
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="iapo",
    help="Inference-aware preference optimization: fine-tune a language model for the way it will be used.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="[CONFIG]", help="the run's YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override, e.g. train.learning_rate=1e-4")
]
Restart = Annotated[bool, typer.Option("--restart", help="discard what was made before and make it again")]

DEFAULT_CONFIG = Path("iapo.yaml")
INTERRUPTED = 130
PIPELINE, CLOSED_FORM = "The pipeline", "The closed form, no model needed"


@app.command(rich_help_panel=PIPELINE)
def demo(out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/demo"), restart: Restart = False):
    """Run the whole pipeline on the bundled model, beside training for plain win rate; ends with report.html's path."""
    from iapo.pipeline import BEFORE_TRAINING, share_samples
    from iapo.start import demo_config, plain_demo_config

    config, plain = demo_config(out), plain_demo_config(out)
    _run_stages(config, BEFORE_TRAINING, restart)
    share_samples(config.run, plain.run)
    _run_stages(plain, ["train"], restart, " for plain win rate, to compare with")
    _run_stages(config, ["train", "evaluate", "report"], restart)
    print(config.run / "report.html")


@app.command(rich_help_panel=PIPELINE)
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder to write iapo.yaml in")]):
    """Write a commented iapo.yaml to start from."""
    from iapo.start import write_config

    path = write_config(folder)
    print(f"{path}\nEdit it, then: cd {folder} && iapo run")


@app.command(rich_help_panel=PIPELINE)
def run(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None, restart: Restart = False):
    """Run every stage that is not done yet; safe to repeat."""
    from iapo.pipeline import STAGES

    loaded = _load(config, overrides)
    _run_stages(loaded, STAGES, restart)
    print(loaded.run / "report.html")


@app.command(rich_help_panel=PIPELINE)
def prompts(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None, restart: Restart = False):
    """Read prompts, drop duplicates, hold some out."""
    _run_one("prompts", config, overrides, restart)


@app.command(rich_help_panel=PIPELINE)
def sample(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None, restart: Restart = False):
    """Sample reference responses to every prompt."""
    _run_one("sample", config, overrides, restart)


@app.command(rich_help_panel=PIPELINE)
def score(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None, restart: Restart = False):
    """Score every response with the reward model or function."""
    _run_one("score", config, overrides, restart)


@app.command(rich_help_panel=PIPELINE)
def calibrate(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None, restart: Restart = False):
    """Turn rewards into quantiles among the reference responses."""
    _run_one("calibrate", config, overrides, restart)


@app.command(rich_help_panel=PIPELINE)
def train(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None, restart: Restart = False):
    """Fit a LoRA adapter to the closed form (reference log-probs first, if they are not there)."""
    loaded = _load(config, overrides)
    from iapo.pipeline import manifest_of, run_stage

    run_stage("ref_logprobs", loaded, restart=restart and manifest_of("ref_logprobs", loaded).state() == "stale")
    _run_one("train", config, overrides, restart)


@app.command(rich_help_panel=PIPELINE)
def evaluate(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None, restart: Restart = False):
    """Measure win rates and KL of every policy on held-out prompts."""
    _run_one("evaluate", config, overrides, restart)


@app.command(rich_help_panel=PIPELINE)
def report(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None, restart: Restart = False):
    """Write report.html."""
    _run_one("report", config, overrides, restart)


@app.command(rich_help_panel=PIPELINE)
def status(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None):
    """Show each stage: done, stale (and why), partial (rows of rows), to do."""
    from rich.console import Console
    from rich.table import Table

    from iapo.pipeline import status as stages

    table = Table("stage", "state", "", box=None, pad_edge=False)
    colors = {"done": "green", "stale": "red", "partial": "yellow", "to do": "dim"}
    for name, state, detail in stages(_load(config, overrides)):
        table.add_row(name, f"[{colors[state]}]{state}[/]", detail)
    Console().print(table)


@app.command(rich_help_panel=PIPELINE)
def estimate(
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
    card: Annotated[str, typer.Option(help="rtx-3060, rtx-4060-ti, rtx-3090, rtx-4090 or h100")] = "rtx-4090",
):
    """Estimate GPU memory and time of each stage before anything is downloaded."""
    from rich.console import Console
    from rich.table import Table

    from iapo.errors import UserError
    from iapo.estimate import CARDS
    from iapo.estimate import estimate as needs

    if card not in CARDS:
        raise UserError(f"--card {card}: expected one of {', '.join(CARDS)}")
    table = Table("stage", "GPU memory", "time", "", box=None, pad_edge=False)
    for need in needs(_load(config, overrides), CARDS[card]):
        fits = need.memory <= CARDS[card].memory
        note = "" if fits else f"[red]more than the {CARDS[card].memory / 1e9:.0f} GB of {card}"
        table.add_row(need.stage, f"{need.memory / 1e9:.1f} GB", f"{need.seconds / 60:,.0f} min", note)
    Console().print(table)
    print("estimated from the model's configuration, not measured")


Opponent = Annotated[str | None, typer.Option(metavar="P", help="the reference's procedure; by default the same one")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="save a figure: .png, .svg or .pdf")]
TRANSFORMS = "optimal, identity, log, first_order, exp_tilt(t) or table(values)"


@app.command(rich_help_panel=CLOSED_FORM)
def transform(
    procedure: Annotated[str, typer.Argument(help="best_of(4), worst_of(4), kth(3, 5), 0.5 sample + 0.5 best_of(8)")],
    opponent: Opponent = None,
    transform: Annotated[str, typer.Option(metavar="T", help=TRANSFORMS)] = "optimal",
    target_kl: Annotated[float | None, typer.Option(metavar="K", help="KL from the reference, in nats")] = None,
    beta: Annotated[float | None, typer.Option(metavar="B", help="weight of the KL, instead of --target-kl")] = None,
    target_win_rate: Annotated[float | None, typer.Option(metavar="W", help="win rate, instead of --target-kl")] = None,
    samples: Annotated[int | None, typer.Option(metavar="K", help="what calibrating with K samples leaves")] = None,
    as_json: AsJson = False,
    plot: Plot = None,
):
    """Print a transform: its density, KL and win rate."""
    from iapo.closed_form import solve
    from iapo.tables import print_closed_form

    form = solve(procedure, opponent, transform, beta=beta, target_kl=target_kl, target_win_rate=target_win_rate)
    print_closed_form(form, as_json, samples)
    if plot:
        from iapo.plots import save_closed_form

        save_closed_form(form, plot)


@app.command(rich_help_panel=CLOSED_FORM)
def frontier(
    procedure: Annotated[str, typer.Argument(help="best_of(4), worst_of(4), kth(3, 5), 0.5 sample + 0.5 best_of(8)")],
    opponent: Opponent = None,
    transform: Annotated[list[str] | None, typer.Option(metavar="T", help=f"{TRANSFORMS}; repeatable")] = None,
    as_json: AsJson = False,
    plot: Plot = None,
):
    """Print win rate against KL for several transforms."""
    from iapo.closed_form import frontier as solve_frontier
    from iapo.tables import print_frontier

    found = solve_frontier(procedure, opponent, transform or ("optimal", "identity"))
    print_frontier(found, as_json)
    if plot:
        from iapo.plots import save_frontier

        save_frontier(found, plot)


@app.command(rich_help_panel=CLOSED_FORM)
def robustness(
    family: Annotated[str, typer.Argument(help="a procedure with n: best_of(n), 0.5 sample + 0.5 best_of(n)")],
    target_kl: Annotated[float, typer.Option(metavar="K", help="KL from the reference, in nats")],
    sizes: Annotated[
        str, typer.Option(metavar="N,N,...", help="the n to train for and to deploy")
    ] = "1,2,4,8,16,32,64",
    as_json: AsJson = False,
    plot: Plot = None,
):
    """Print what is won at a fixed KL for each n, and lost by deploying another n than the one trained for."""
    from iapo.deployment import robustness as compare
    from iapo.errors import UserError
    from iapo.tables import print_robustness

    try:
        numbers = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise UserError(f"--sizes {sizes}: whole numbers with commas between them expected, such as 1,2,4,8") from None
    found = compare(family, target_kl, numbers)
    print_robustness(found, as_json)
    if plot:
        from iapo.plots import save_robustness

        save_robustness(found, plot)


def _load(path: Path, overrides: list[str] | None):
    from iapo.config import load_config

    return load_config(path, tuple(overrides or ()))


def _run_one(name: str, path: Path, overrides: list[str] | None, restart: bool) -> None:
    from iapo.pipeline import run_stage

    config = _load(path, overrides)
    if not run_stage(name, config, restart=restart):
        print(f"{name}: done before; --restart makes it again")


def _run_stages(config, stages: Iterable[str], restart: bool, purpose: str = "") -> None:
    from iapo.pipeline import run_all
    from iapo.progress import console

    def announce(stage: str, done: bool) -> None:
        console.print(f"[bold]{stage}[/]{purpose}" + (" [dim]done before[/]" if done else ""))

    run_all(config, restart=restart, announce=announce, stages=stages)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failure, 2 a user's mistake, 130 Ctrl-C; a traceback with --debug."""
    from typer.exceptions import Abort, Exit, TyperException

    from iapo.errors import UserError

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("iapo").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    code, message = 0, ""
    failure: BaseException | None = None
    try:
        code = app(arguments or ["--help"], standalone_mode=False) or 0
    except (KeyboardInterrupt, Abort):
        code = INTERRUPTED
    except Exit as stop:
        code = stop.exit_code  # of Ctrl-C too, which typer turns into this
    except TyperException as error:  # an unknown command or option
        code, message = 2, f"{error.format_message().rstrip('.')}; `iapo --help` lists what there is"
    except UserError as error:
        failure = error
        code, message = 2, str(error)
    except Exception as error:  # the last resort: one line for a person, the traceback on request
        failure = error
        code, message = 1, f"{type(error).__name__}: {' '.join(str(error).split())}"
    if code == INTERRUPTED:
        message = "interrupted; what was computed is kept, run the same command again to go on"
    if message:
        if debug and failure is not None:
            traceback.print_exception(failure)
        print(f"iapo: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
