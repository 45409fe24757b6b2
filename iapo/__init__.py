"""Inference-aware preference optimization (arXiv 2412.19792). The closed form's public names are here."""

import logging
from importlib import import_module
from typing import Any

_MODULES = {
    "iapo.procedures": (
        "sample",
        "best_of",
        "worst_of",
        "kth",
        "best_of_poisson",
        "early_stop",
        "mixture",
        "Functional",
        "Procedure",
        "parse_procedure",
    ),
    "iapo.transforms": ("identity", "exp_tilt", "log", "first_order", "optimal", "table", "parse_transform"),
    "iapo.closed_form": (
        "ClosedForm",
        "Frontier",
        "solve",
        "optimal_transform",
        "optimal_win_rate",
        "frontier",
        "win_rate_of_cdf",
    ),
    "iapo.deployment": ("Robustness", "robustness"),
    "iapo.atoms": ("atom_log_density", "atom_win_rate", "atom_kl", "tie_pattern"),
    "iapo.errors": ("UserError",),
}
# bitsandbytes says at import that an optional CPU kernel is not installed; it has its own and uses it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562), so that `import iapo` is instant."""
    if name not in _HOME:
        raise AttributeError(f"module 'iapo' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
