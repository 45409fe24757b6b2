"""Win rate per nat of every way to train, at equal KL on the same samples and judge. A table and one JSON line.

    python benchmarks/quality.py SETTING [--data PATH] [--procedures "best_of(4)" ...] [--kls 0.25 0.5 1] [--seed 0]

SETTING: `enumerable` (KL and win rate are exact: benchmarks/enumerable.py), `bundled` (the demo's model), `hh` and
`gsm8k` (small models trained on the data set PATH: benchmarks/hh.py, benchmarks/gsm8k.py).

Methods: iapo with the optimal transform, exp_tilt(10), identity and log (these two are QRPO's), and TRL's DPO, IPO and
KTO, each with every beta of --betas. iapo's are trained for each KL (optimal: for each procedure too), and every
adapter is scaled to the KL asked for as `iapo train` does it, by KL alone: so all methods are compared at the same KL
(that of held-out prompts; where it is exact, of the prompts that were trained on, for others have little in common).
Of a method's adapters the one that wins most on the held-out prompts stands for it, which favours those with several.

`of gain`: (win rate − identity's closed form) / (closed form − identity's closed form), at the measured KL.
`optimal −`: how much more the optimal transform wins, with the 95 % interval of a bootstrap over prompts of the
difference. What was trained before in the output folder is not trained again; result.json there has all figures.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import enumerable, gsm8k, hh  # noqa: E402
from benchmarks.baselines import METHODS, train_baseline  # noqa: E402
from iapo import kl_budget  # noqa: E402
from iapo.atoms import atom_kl, atom_log_density, atom_win_rate, most_win_rate  # noqa: E402
from iapo.closed_form import solve  # noqa: E402
from iapo.config import Config, make_config  # noqa: E402
from iapo.estimators import mean_over_prompts  # noqa: E402
from iapo.evaluate import HIGHEST_KL, prompt_win_rates, tied_levels  # noqa: E402
from iapo.models import load_policy  # noqa: E402
from iapo.pipeline import BEFORE_TRAINING, run_stage, share_samples  # noqa: E402
from iapo.procedures import pairings, parse_procedure  # noqa: E402
from iapo.store import read_table, write_json  # noqa: E402

OPTIMAL = "optimal"
SETTINGS: dict[str, dict[str, Any]] = {
    "enumerable": {
        "prompts": {"holdout": 4},
        "sample": {"samples_per_prompt": 4096},
        "train": {"learning_rate": 4e-3, "epochs": 5, "batch_size": 256, "micro_batch_size": 256, "lora_rank": 64},
    },
    "bundled": {"prompts": {"limit": 600}, "calibrate": {"pool": True}},
    "hh": {"prompts": {"limit": 1060, "holdout": 240}, "calibrate": {"pool": True}},
    "gsm8k": {"prompts": {"limit": 1128}, "sample": {"samples_per_prompt": 16}},
}
"""Sections of each setting's configuration, over those that all have in common."""


@dataclass(frozen=True)
class Trained:
    """An adapter at a KL: how it was trained, the KL asked for, the factor on it and the KL without the factor.

    procedure: the one that it was trained for; empty where training does not depend on it.
    """

    method: str
    knob: str
    procedure: str
    asked_kl: float
    factor: float = 1.0
    kl_before: float = 0.0
    adapter: Path = Path()

    @property
    def name(self) -> str:
        """Tells the adapters of a run apart; fit for a file."""
        return file_name(f"{self.method}-{self.procedure}-{self.knob}-at-{self.asked_kl:g}")


@dataclass(frozen=True)
class Measured:
    """What a method has at a KL: measured KL and win rate, their errors, and the closed forms at the measured KL."""

    method: str
    knob: str
    procedure: str
    asked_kl: float
    split: str
    kl: float
    kl_se: float
    win_rate: float
    win_rate_low: float
    win_rate_high: float
    closed_form: float
    reference: float
    identity: float
    prompt_win_rates: tuple[float, ...]

    @property
    def met(self) -> bool:
        """Whether it spends the KL asked for, to a quarter; else it is not compared."""
        return abs(self.kl / self.asked_kl - 1) <= 0.25

    @property
    def kl_efficiency(self) -> float:
        """Gain over the reference, as a share of what is possible."""
        return (self.win_rate - self.reference) / (self.closed_form - self.reference)

    @property
    def of_gain(self) -> float | None:
        """Gain over the optimum for plain win rate, as a share of what is possible; below 0 if it wins less."""
        possible = self.closed_form - self.identity
        return (self.win_rate - self.identity) / possible if possible > 0 else None


# --- Settings -------------------------------------------------------------------------------------------------------


def configuration(args: argparse.Namespace, run: Path, transform: str, procedure: str, kl: float) -> Config:
    """A run of the setting; only the objective differs between runs."""
    common: dict[str, dict[str, Any]] = {
        "model": {"quantization": "none"},
        "prompts": {"holdout": 128},
        "sample": {"samples_per_prompt": 32, "batch_size": 128},
        "reward": {},
        "calibrate": {},
        "train": {"lora_rank": 32, "learning_rate": 3e-4, "batch_size": 32, "micro_batch_size": 32, "evaluations": 1},
        "evaluate": {"samples_per_prompt": 32, "procedures": args.procedures},
    }
    objective = {"procedure": procedure, "target_kl": kl, "transform": transform}
    config = common | {"run": str(run), "seed": args.seed, "objective": objective}
    for more in (setting_sections(args), SETTINGS[args.setting], json.loads(args.sections)):
        for section, values in more.items():
            config[section] = config[section] | values
    return make_config(config, "benchmarks/quality.py")


def setting_sections(args: argparse.Namespace) -> dict[str, Any]:
    """Model, prompts, responses and reward of the setting, made where they are missing."""
    models = args.out.parent / f"{args.setting}-models"
    match args.setting:
        case "enumerable":
            return enumerable.sections(args.out / "model", args.seed)
        case "bundled":
            return {
                "model": {"base": "bundled"},
                "prompts": {"source": "bundled"},
                "sample": {"max_new_tokens": 64},
                "reward": {"model": "bundled", "batch_size": 256},
            }
        case "hh":
            return hh.sections(args.data, models)
    return gsm8k.sections(args.data, models)


# --- Training -------------------------------------------------------------------------------------------------------


def train_all(args: argparse.Namespace, samples: Path) -> Iterator[Trained]:
    """Every method with every knob at every KL, on the samples of one run; what was trained before is not again."""
    kls = enumerable.training_kls if args.setting == "enumerable" else kl_budget.sampled_kls
    for transform in args.transforms:
        procedures = args.procedures if transform == OPTIMAL else args.procedures[:1]
        for procedure, kl in product(procedures, args.kls):
            run = args.out / file_name(f"iapo-{transform}-{procedure}-{kl:g}")
            if not run.exists():
                share_samples(samples, run)
            config = configuration(args, run, transform, procedure, kl)
            run_stage("train", config)
            target = procedure if transform == OPTIMAL else ""
            yield scaled(config, run / "adapter", Trained(transform, f"trained for {kl:g}", target, kl), kls)
    for method in args.baselines:
        for beta in args.betas:
            adapter = args.out / file_name(f"{method}-{beta:g}")
            config = configuration(args, samples, OPTIMAL, args.procedures[0], args.kls[0])
            if not (adapter / "adapter_config.json").exists():
                train_baseline(method, beta, config, adapter)
            for kl in args.kls:
                yield scaled(config, adapter, Trained(method, f"beta {beta:g}", "", kl), kls)


def scaled(config: Config, adapter: Path, asked: Trained, measured: Callable[..., Any]) -> Trained:
    """A copy of an adapter that has the KL asked for, as far as a factor can do it.

    measured: gives the KL of a policy, see `kl_budget.meet`.
    """
    copy = config.run.parent / "adapters" / asked.name
    about = copy / "scale.json"
    if not about.exists():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(adapter, copy, ignore=shutil.ignore_patterns("trainer"))
        write_json(about, kl_budget.meet(config, copy, asked.asked_kl, measured))
    scale = json.loads(about.read_text())
    return replace(asked, factor=scale["factor"], kl_before=scale["kl_before"], adapter=copy)


# --- Measuring ------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, samples: Path, trained: list[Trained]) -> Iterator[Measured]:
    """All policies on the same held-out prompts, against the same samples of the reference, by `iapo evaluate`."""
    run = args.out / "evaluated"
    if not run.exists():
        share_samples(samples, run)
    first = trained[0]
    config = configuration(args, run, first.method, first.procedure or args.procedures[0], first.asked_kl)
    sections = config.model_dump(mode="json", exclude_none=True)
    sections["evaluate"]["adapters"] = {one.name: str(one.adapter) for one in trained}
    config = make_config(sections)
    if not (run / "adapter").exists():
        own = args.out / file_name(f"iapo-{first.method}-{config.objective.procedure}-{first.asked_kl:g}")
        shutil.copytree(own / "adapter", run / "adapter")
        shutil.copy(own / "manifests" / "train.json", run / "manifests")
    run_stage("evaluate", config)
    table = read_table(run / "evaluation" / "samples.parquet").to_pandas()
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())["policies"]
    records = {(record["name"], record["procedure"]): record for record in metrics}
    quantiles = {
        row["prompt_id"]: np.array(row["rewards"]) for row in read_table(run / "quantiles.parquet").to_pylist()
    }
    levels, untied = tied_levels([quantiles[name] for name in table["prompt_id"].unique()])
    for one in trained:
        own = table[table["policy"] == one.name]
        for procedure in [one.procedure] if one.procedure else args.procedures:
            record = records[one.name, procedure]
            if record["closed_form_win_rate"] is None:
                continue  # it has not moved
            deployed = parse_procedure(procedure)
            yield Measured(
                one.method,
                one.knob,
                procedure,
                one.asked_kl,
                "holdout",
                record["kl"],
                record["kl_se"],
                record["win_rate"],
                record["win_rate_low"],
                record["win_rate_high"],
                record["closed_form_win_rate"],
                record["reference_win_rate"],
                plain_win_rate(procedure, record["kl"], tuple(map(tuple, levels)), untied),
                tuple(prompt_win_rates(own, quantiles, deployed, deployed)),
            )


def measure_exactly(args: argparse.Namespace, samples: Path, trained: list[Trained]) -> Iterator[Measured]:
    """All policies of the enumerable setting, on the prompts that were trained on and on the others.

    Closed forms are those of the prompts' own responses, equation (8): nobody can tell apart what lies within one.
    """
    for one in trained:
        config = configuration(args, samples, OPTIMAL, args.procedures[0], one.asked_kl)
        policy = load_policy(config.model, one.adapter)
        for split in enumerable.SPLITS:
            masses, log_f = enumerable.exact(config, policy, split)
            kl = float(atom_kl(masses, log_f).mean())
            for procedure in [one.procedure] if one.procedure else args.procedures:
                deployed = parse_procedure(procedure)
                win_rates = atom_win_rate(masses, log_f, pairings(deployed))
                win_rate = float(win_rates.mean())
                best = most_win_rate(masses, 0, deployed, deployed, kl)
                identity = plain_win_rate(procedure, kl, tuple(map(tuple, masses)), 0)
                exact = (kl, 0.0, win_rate, win_rate, win_rate, best, 0.5, identity, tuple(win_rates))
                yield Measured(one.method, one.knob, procedure, one.asked_kl, split, *exact)


@cache
def plain_win_rate(procedure: str, kl: float, levels: tuple[tuple[float, ...], ...] = (), untied: int = 1) -> float:
    """The win rate under a procedure of the policy that is optimal for plain win rate at this KL.

    levels and untied: `evaluate.tied_levels`; where rewards tie, plain win rate has its optimum on the prompts' levels.
    """
    if not levels:
        return solve(procedure, None, "identity", target_kl=min(kl, HIGHEST_KL)).win_rate
    masses = np.array(levels)
    share = len(masses) / (len(masses) + untied)

    def at(log_beta: float) -> tuple[float, float]:
        form = solve("sample", None, beta=float(np.exp(log_beta)))
        log_f = atom_log_density(masses, form)
        wins = atom_win_rate(masses, log_f, pairings(parse_procedure(procedure))).mean()
        continuous = solve(procedure, None, "identity", target_kl=form.kl).win_rate if untied else 0.0
        spent = share * atom_kl(masses, log_f).mean() + (1 - share) * form.kl
        return share * wins + (1 - share) * continuous, spent - kl

    return at(brentq(lambda log_beta: at(log_beta)[1], -12, 5, xtol=1e-4))[0]


def best_of_each(found: list[Measured]) -> list[Measured]:
    """Of those that met their KL, the one of each procedure, KL, split and method that wins most, in that order."""
    best: dict[tuple[str, float, str, str], Measured] = {}
    for one in found:
        key = (one.procedure, one.asked_kl, one.split, one.method)
        if one.met and (key not in best or one.win_rate > best[key].win_rate):
            best[key] = one
    return [best[key] for key in sorted(best, key=lambda key: (*key[:3], -best[key].win_rate))]


def print_table(chosen: list[Measured], seed: int) -> None:
    """One line a method, procedure, KL and split."""
    print(f"{'procedure':<13}{'asked':>6} {'split':<8} {'method':<13}{'KL ± se':>16}{'win rate':>23}", end="")
    print(f"{'closed form':>12}{'efficiency':>11}{'identity':>9}{'of gain':>8}  optimal −")
    optimal = {(one.procedure, one.asked_kl, one.split): one for one in chosen if one.method == OPTIMAL}
    for one in chosen:
        interval = f"{one.win_rate:.3f} [{one.win_rate_low:.3f}, {one.win_rate_high:.3f}]"
        line = f"{one.procedure:<13}{one.asked_kl:>6g} {one.split:<8} {one.method:<13}"
        line += f"{one.kl:>8.3f} ± {one.kl_se:.3f}{interval:>23}"
        line += f"{one.closed_form:>12.3f}{one.kl_efficiency:>11.3f}{one.identity:>9.3f}"
        line += f"{'-' if one.of_gain is None else format(one.of_gain, '.2f'):>8}"
        ours = optimal.get((one.procedure, one.asked_kl, one.split))
        if ours is not None and ours is not one:
            apart = mean_over_prompts(np.subtract(ours.prompt_win_rates, one.prompt_win_rates), seed)
            line += f"  {apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]"
        print(line)


def file_name(text: str) -> str:
    """A text as the name of a file."""
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, with procedures as they are written and the setting's folder as `out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--data", type=Path, help="the data set of hh and gsm8k")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--procedures", nargs="+", default=["best_of(4)"])
    parser.add_argument("--transforms", nargs="*", default=[OPTIMAL, "exp_tilt(10)", "identity", "log"])
    parser.add_argument("--baselines", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--betas", nargs="+", type=float, default=[0.1, 0.5])
    parser.add_argument("--kls", nargs="+", type=float, default=[0.25, 0.5, 1.0])
    parser.add_argument("--sections", default="{}", help="JSON of sections over the setting's own")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.setting in ("hh", "gsm8k") and args.data is None:
        parser.error(f"{args.setting} needs --data, where the data set lies")
    args.procedures = [str(parse_procedure(text)) for text in args.procedures]
    args.data = args.data and args.data.resolve()
    args.out = args.out.resolve() / f"{args.setting}-{args.seed}"
    return args


def main(argv: list[str] | None = None) -> list[Measured]:
    """Sample once, train everything, measure everything, print the table and the JSON line."""
    args = parse(argv)
    os.chdir(ROOT)  # where reward functions are looked for
    samples = args.out / "samples"
    for stage in BEFORE_TRAINING:
        run_stage(stage, configuration(args, samples, OPTIMAL, args.procedures[0], args.kls[0]))
    trained = list(train_all(args, samples))
    measured = list((measure_exactly if args.setting == "enumerable" else measure)(args, samples, trained))
    print_table(best_of_each(measured), args.seed)
    adapters = [asdict(one) | {"adapter": one.name} for one in trained]
    figures = [
        {name: value for name, value in asdict(one).items() if name != "prompt_win_rates"}
        | {"kl_efficiency": one.kl_efficiency, "of_gain": one.of_gain, "met": one.met}
        for one in measured
    ]
    about = {"benchmark": "quality", "setting": args.setting, "seed": args.seed}
    result = about | {"adapters": adapters, "measured": figures}
    write_json(args.out / "result.json", result)
    print(json.dumps(result))
    return measured


if __name__ == "__main__":
    main()
