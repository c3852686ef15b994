"""Finds the bundles there are: those in `artifacts/` and those used of late. Loads none, and knows no widgets."""

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
MOST = 500  # folders looked at
RECENT: Final = Section[list[str]]("recent", list, texts, list)
_MOST_RECENT = 12


@dataclass(frozen=True, slots=True)
class Offer:
    """A precision of a bundle, as it is offered.

    Attributes:
        path: the bundle.
        name: of its model.
        precision: as `--precision` takes it.
        size: bytes of graph and weights.
        fidelity: what is known of how near it is to the reference, in a few words.
        preferred: whether a bundle is loaded in this precision where none is named.
    """

    path: Path
    name: str
    precision: str
    size: int
    fidelity: str
    preferred: bool

    @property
    def megabytes(self) -> str:
        """The size, for people."""
        return f"{self.size / 1e6:,.0f} MB"


@dataclass(frozen=True, slots=True)
class Broken:
    """A folder that was meant to be a bundle, and why it is none: one line."""

    path: Path
    reason: str


def offers(others: Iterable[Path] = (), folder: Path = ARTIFACTS) -> list[Offer | Broken]:
    """What can be loaded, and what cannot and why: the bundles in `folder` by name, then others.

    Of the others, one that is gone is left out; of a folder that holds no manifest nobody said that it is a bundle.
    """
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
    """Bundles used of late, the latest first."""
    return [Path(each) for each in settings.get(RECENT)]


def used(settings: Settings, bundle: Path) -> None:
    """A bundle was used: it is the latest now.

    Raises:
        MachineError: that cannot be kept.
    """
    path = str(bundle.absolute())
    settings.change(RECENT, lambda before: [path, *(each for each in before if each != path)][:_MOST_RECENT])


def _offers(path: Path) -> list[Offer] | Broken:
    from llm_edge.runtime.backend.providers import (
        cuda_works,  # onnxruntime takes its time, which whoever lists them has
    )

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
    """KL and top-1 against the reference, as validation wrote them down; `not validated` where it wrote nothing."""
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
        return [path for _, path in zip(range(MOST), sorted(folder.iterdir()), strict=False) if _is_bundle(path)]
    except OSError:
        return []


def _is_bundle(path: Path) -> bool:
    """Whether it looks like one; False too for what cannot be looked at."""
    try:
        return stat.S_ISDIR(path.stat().st_mode) and (path / MANIFEST).exists()
    except (OSError, ValueError):
        return False


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path.absolute()
