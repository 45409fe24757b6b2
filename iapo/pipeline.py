"""The order of the stages, what each depends on, and how one or all of them are run."""

import importlib
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iapo.config import BUNDLED, BUNDLED_FOLDER, Config, RewardConfig
from iapo.errors import UserError
from iapo.store import (
    Manifest,
    content_id,
    count_rows,
    fingerprint,
    read_manifest,
    weights_fingerprint,
    write_text,
)


@dataclass(frozen=True)
class Stage:
    """A stage: the module `iapo.NAME` has its `run(config, manifest)`.

    inputs: the stages whose outputs it reads. outputs: files and folders it makes, below the run folder.
    settings: the part of the configuration that decides its result; free: those of them that decide only how it is
    come by (memory, where a server is), so that they may change. command: the subcommand that runs it.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: Callable[[Config], dict[str, Any]]
    made_of: Callable[[Config], dict[str, str]] = lambda config: {}
    """fingerprints of files from outside the run, by name"""
    command: str = ""
    free: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.command:
            object.__setattr__(self, "command", self.name)


def _dump(section: Any, *leave_out: str) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude=set(leave_out))


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "prompts",
            (),
            ("prompts.parquet", "given.parquet"),
            lambda config: {"prompts": _dump(config.prompts), "seed": config.seed},
            lambda config: _source_files(config),
        ),
        Stage(
            "sample",
            ("prompts",),
            ("responses",),
            lambda config: {"model": _dump(config.model), "sample": _dump(config.sample), "seed": config.seed},
            lambda config: _base_files(config),
            free=("sample.batch_size", "sample.server"),
        ),
        Stage(
            "score",
            ("prompts", "sample"),
            ("rewards",),
            lambda config: {"reward": _dump(config.reward, "batch_size")},
            lambda config: _reward_files(config.reward),
        ),
        Stage(
            "calibrate",
            ("prompts", "sample", "score"),
            ("quantiles.parquet", "calibrated.parquet"),
            lambda config: {"calibrate": _dump(config.calibrate), "seed": config.seed},
        ),
        Stage(
            "ref_logprobs",
            ("prompts", "sample"),
            ("ref_logprobs",),
            lambda config: {"model": _dump(config.model), "sample": {"temperature": config.sample.temperature}},
            command="train",
        ),
        Stage(
            "train",
            ("prompts", "sample", "calibrate", "ref_logprobs"),
            ("adapter", "checkpoints"),
            lambda config: {
                "model": _dump(config.model),
                "objective": _dump(config.objective),
                "train": _dump(config.train),
                "seed": config.seed,
            },
            free=("train.micro_batch_size", "train.gradient_checkpointing"),
        ),
        Stage(
            "evaluate",
            ("prompts", "sample", "score", "calibrate", "train"),
            ("evaluation",),
            lambda config: {
                "model": _dump(config.model),
                "sample": {"max_new_tokens": config.sample.max_new_tokens, "temperature": config.sample.temperature},
                "reward": _dump(config.reward, "batch_size"),
                "procedure": config.objective.procedure,
                "opponent": config.objective.opponent,
                "evaluate": _dump(config.evaluate) | {"adapters": dict.fromkeys(config.evaluate.adapters, "")},
                "seed": config.seed,
            },
            lambda config: _adapter_files(config) | _judge_files(config),
        ),
        Stage("report", ("calibrate", "train", "evaluate"), ("report.html",), lambda config: {}),
    )
}


BEFORE_TRAINING = ("prompts", "sample", "score", "calibrate", "ref_logprobs")
"""What training starts from, whatever its objective."""


def run_stage(name: str, config: Config, *, restart: bool = False) -> bool:
    """Run one stage unless it is done; returns whether there was anything to do.

    UserError where a stage it needs is not done, or where what is stored was made from something else and restart is
    not set. Restarting discards what the stage made.
    """
    stage = STAGES[name]
    for needed in stage.inputs:
        state = manifest_of(needed, config).state()
        if state != "done":
            command = STAGES[needed].command
            raise UserError(f"{name} needs {needed}, which is {state}; run `iapo {command}` or `iapo run` first")
    if restart or not _made(config, name):
        discard(name, config)
    manifest = manifest_of(name, config)
    manifest.start()
    if manifest.state() == "done":
        return False
    write_text(config.run / "config.json", config.model_dump_json(indent=2) + "\n")
    importlib.import_module(f"iapo.{name}").run(config, manifest)
    return True


def check(config: Config) -> None:
    """UserError for what is wrong in a configuration and would only be met by its last stages."""
    from iapo.evaluate import check_procedures
    from iapo.transforms import as_transform

    if config.prompts.holdout < 2:
        raise UserError("prompts.holdout is 1, which tells no error of the KL; expected two or more prompts held out")
    check_procedures(config)
    as_transform(config.objective.transform)
    for reward in filter(None, (config.reward, config.evaluate.judge)):
        if reward.function and _module_file(reward.function) is None:
            module = reward.function.partition(":")[0]
            raise UserError(f"reward.function {reward.function}: no module {module}; looked in {Path.cwd()} first")


def run_all(
    config: Config,
    *,
    restart: bool = False,
    announce: Callable[[str, bool], None],
    stages: Iterable[str] = tuple(STAGES),
) -> None:
    """Run every stage that is not done, in order; `announce(stage, done before)` is called before each."""
    check(config)
    for name in stages:
        announce(name, not restart and manifest_of(name, config).state() == "done")
        run_stage(name, config, restart=restart)


def share_samples(run: Path, other: Path) -> None:
    """Give another run folder what training starts from, as a finished run has it now, in place of its own.

    Its manifests go first and come last, so that what an interruption leaves is not taken for made.
    """
    for name in BEFORE_TRAINING:
        for manifest in (other / "manifests").glob(f"{name}.*json"):
            manifest.unlink()
        for output in STAGES[name].outputs:
            _remove(other / output)
            if (run / output).is_dir():
                shutil.copytree(run / output, other / output)
            elif (run / output).exists():
                other.mkdir(parents=True, exist_ok=True)
                shutil.copy(run / output, other / output)
        write_text(other / "manifests" / f"{name}.json", (run / "manifests" / f"{name}.json").read_text())


def discard(name: str, config: Config) -> None:
    """Remove what a stage made and the record that it was made; the latter last, so that no rest is taken for new."""
    manifest = manifest_of(name, config)
    manifest.reopen()
    for output in STAGES[name].outputs:
        _remove(config.run / output)
    manifest.discard()


def _made(config: Config, name: str) -> bool:
    """Whether anything of a stage is there; one that failed before may begin anew with whatever was mended."""
    outputs = [config.run / output for output in STAGES[name].outputs]
    files = [path for output in outputs for path in (output, *output.rglob("*")) if path.is_file()]
    return any(path.suffix != ".parquet" or count_rows(path) for path in files)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def manifest_of(name: str, config: Config) -> Manifest:
    """The record of a stage, as it would be for this configuration and for what its inputs are now."""
    stage = STAGES[name]
    inputs = {needed: _outputs_id(config.run, needed) for needed in stage.inputs}
    identity = {"settings": stage.settings(config), "inputs": inputs | stage.made_of(config)}
    return Manifest(config.run, name, identity, stage.command, stage.free)


def status(config: Config) -> list[tuple[str, str, str]]:
    """Name, state and a detail of every stage: rows done, or why it is stale."""
    found = []
    for name, stage in STAGES.items():
        manifest = manifest_of(name, config)
        state = manifest.state()
        if state == "stale" and not _made(config, name):
            state = "to do"
        rows = count_rows(config.run / stage.outputs[0]) if state == "partial" else None
        record = read_manifest(config.run, name) or {}
        match state:
            case "stale":
                detail = "; ".join(manifest.differences())
            case "partial":
                detail = f"{rows:,} of {_expected_rows(name, config):,} rows" if rows else "begun"
            case "done":
                detail = f"{record['rows']:,} rows" if "rows" in record else ""
            case _:
                detail = ""
        found.append((name, state, detail))
    return found


def _expected_rows(name: str, config: Config) -> int:
    prompts = count_rows(config.run / "prompts.parquet")
    return prompts * config.sample.samples_per_prompt if name == "sample" else count_rows(config.run / "responses")


def _outputs_id(run: Path, stage: str) -> str:
    """One identifier of all that a finished stage made; equal content has an equal one."""
    record = read_manifest(run, stage)
    return content_id(record["outputs"]) if record else "not done"


def _source_files(config: Config) -> dict[str, str]:
    from iapo.prompts import BUNDLED_PROMPTS

    path = BUNDLED_PROMPTS if config.prompts.source == BUNDLED else Path(config.prompts.source)
    return {"prompts.source": fingerprint(path)} if path.exists() else {}


def _base_files(config: Config) -> dict[str, str]:
    template = config.model.chat_template
    found = _model_files("model.base", config.model.base, "reference")
    return found | ({"model.chat_template": fingerprint(template)} if template and template.is_file() else {})


def _model_files(key: str, name: str, part: str) -> dict[str, str]:
    """Of a model in a folder, or of the package's own, which another version of it may have trained anew."""
    if name == BUNDLED:
        return {key: fingerprint(BUNDLED_FOLDER / part)}
    return {key: weights_fingerprint(Path(name))} if Path(name).is_dir() else {}


def _reward_files(config: RewardConfig, key: str = "reward") -> dict[str, str]:
    if config.function is None:
        return _model_files(f"{key}.model", str(config.model), "reward")
    file = _module_file(config.function)
    return {f"{key}.function": fingerprint(file)} if file else {}


def _module_file(function: str) -> Path | None:
    """The file of module:function, looked for in the current folder first; None where there is none."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.util.find_spec(function.partition(":")[0])
    except ModuleNotFoundError:
        return None
    return Path(found.origin) if found and found.origin else None


def _judge_files(config: Config) -> dict[str, str]:
    return _reward_files(config.evaluate.judge, "evaluate.judge") if config.evaluate.judge else {}


def _adapter_files(config: Config) -> dict[str, str]:
    adapters = config.evaluate.adapters
    return {f"evaluate.adapters.{name}": fingerprint(path) for name, path in adapters.items() if path.is_dir()}
