"""What a new user starts from: the demo's configuration and a commented one of their own."""

from pathlib import Path

from iapo.config import Config, load_config
from iapo.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
PLAIN = "plain win rate"


def demo_config(out: Path) -> Config:
    """The demo: the bundled model, reward and prompts, stored in `out`; compared with `plain_demo_config`."""
    plain = plain_demo_config(out).run / "adapter"
    return load_config(TEMPLATES / "demo.yaml", (f"run={out}", f"evaluate.adapters.{PLAIN}={plain}"))


def plain_demo_config(out: Path) -> Config:
    """The same run, trained for plain win rate: what the demo is compared with, stored in `out/plain`."""
    return load_config(TEMPLATES / "demo.yaml", (f"run={out / 'plain'}", "objective.transform=identity"))


def write_config(folder: Path) -> Path:
    """Write iapo.yaml into a folder, made if need be; UserError where there is one already."""
    path = folder / "iapo.yaml"
    if path.exists():
        raise UserError(f"{path} is there already; edit it, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text((TEMPLATES / "iapo.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    return path
