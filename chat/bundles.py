"""Lists the bundles in `artifacts/` and those used recently, without loading them."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llm_edge.chat.settings import Section, Settings, texts
from llm_edge.runtime.bundle import MANIFEST, Bundle, PrecisionInfo
from llm_edge.runtime.errors import BundleError

ARTIFACTS = Path("artifacts")
DEFAULT = ARTIFACTS / "smollm2-135m"
_MAX_FOLDERS = 500
RECENT: Final = Section[list[str]]("recent", list, texts)
_MAX_RECENT = 12


@dataclass(frozen=True, slots=True)
class Offer:
    """A precision of a bundle, for a list of models."""

    path: Path
    name: str  # of the model
    precision: str
    size: int  # bytes of graph and weights
    fidelity: str  # how close it is to the reference, in a few words
    preferred: bool  # whether it is loaded by default

    @property
    def megabytes(self) -> str:
        """The size in MB, formatted."""
        return f"{self.size / 1e6:,.0f} MB"


@dataclass(frozen=True, slots=True)
class Broken:
    """A folder that looks like a bundle but cannot be used, with a one-line reason."""

    path: Path
    reason: str


def offers(others: Iterable[Path] = (), folder: Path = ARTIFACTS) -> list[Offer | Broken]:
    """List the bundles in `folder` by name, then `others`; folders without a manifest are left out."""
    found: dict[Path, list[Offer] | Broken] = {}
    for path in (*_inside(folder), *(each for each in others if _is_bundle(each))):
        place = _resolved(path)
        if place not in found:
            found[place] = _offers(path)
    listed: list[Offer | Broken] = []
    for each in found.values():
        listed.extend([each] if isinstance(each, Broken) else each)
    return listed


def recent(settings: Settings) -> list[Path]:
    """Recently used bundles, the latest first."""
    return [Path(each) for each in settings.get(RECENT)]


def used(settings: Settings, bundle: Path) -> None:
    """Make a bundle the first of the recently used ones.

    Raises:
        MachineError: the settings cannot be written.
    """
    path = str(bundle.absolute())
    settings.change(RECENT, lambda before: [path, *(each for each in before if each != path)][:_MAX_RECENT])


def _offers(path: Path) -> list[Offer] | Broken:
    from llm_edge.runtime.backend.providers import cuda_works  # loads onnxruntime, which is slow

    try:
        bundle = Bundle.open(path)
        preferred = bundle.precision(half=cuda_works()).name
    except (BundleError, OSError) as error:
        return Broken(path, str(error))
    return [
        Offer(path, bundle.name, info.name, info.size, fidelity(info), info.name == preferred)
        for info in bundle.precisions.values()
    ]


def fidelity(info: PrecisionInfo) -> str:
    """KL divergence and top-1 agreement with the reference, if validation measured them."""
    kl, top1 = _number(info.quality, "kl_mean"), _number(info.quality, "top1")
    if kl is not None and top1 is not None:
        return f"KL {kl:.1e}, top-1 {top1:.1%}"
    return "validated" if info.parity else "not validated"


def _number(figures: Mapping[str, Any], name: str) -> float | None:
    value = figures.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:  # NaN compares false
        return None
    return float(value)


def _inside(folder: Path) -> list[Path]:
    try:
        return [
            path for _, path in zip(range(_MAX_FOLDERS), sorted(folder.iterdir()), strict=False) if _is_bundle(path)
        ]
    except OSError:
        return []


def _is_bundle(path: Path) -> bool:
    """Whether a path is a readable folder with a manifest."""
    try:
        return stat.S_ISDIR(path.stat().st_mode) and (path / MANIFEST).exists()
    except (OSError, ValueError):
        return False


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path.absolute()
