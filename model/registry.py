"""What a family is, and where families are found. A package of anybody's can add one (docs/families.md)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llm_edge.model.config import ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.weights import WeightTable
from llm_edge.runtime.errors import CheckpointError

ENTRY_POINTS = "llm_edge.families"


@dataclass(frozen=True, slots=True)
class Family:
    """How to read one `model_type`.

    Attributes:
        config: from the keys of a Hugging Face `config.json` to our shape; refuses what it cannot honour. The keys it
            reads, and no others, stand in the bundle's own config.json.
        weights: the weight table for such a config. Its names are those that transformers saves.
        base: prefix of the tensors' names (but the head's) that a checkpoint of the body alone lacks.
        transposed: regular expression of whole names of weights that the source stores as [in, out].
    """

    config: Callable[[ConfigReader], ModelConfig]
    weights: Callable[[ModelConfig, ConfigReader], WeightTable]
    base: str = "model."
    transposed: str = "(?!)"

    def names(self, found: Mapping[str, object]) -> dict[str, str]:
        """Names as the weight table has them -> names as the file has them."""
        bare = not any(name.startswith(self.base) for name in found)
        return {
            self.base + name if bare and not name.startswith(("lm_head.", "embed_out.")) else name: name
            for name in found
        }


def find_family(model_type: str, where: str = "config.json") -> Family:
    """The family of a `model_type`: one of ours, else one that an installed package brings.

    A name is only compared with the names of entry points of installed packages: nothing is imported because a config
    names it, and no package can take the place of a family of ours.

    Args:
        model_type: as a config has it.
        where: the config's file, for messages.

    Raises:
        CheckpointError: there is none, or the package that brings it is broken.
    """
    from llm_edge.model.families.table import FAMILIES

    if model_type in FAMILIES:
        return FAMILIES[model_type]
    plugins = importlib.metadata.entry_points(group=ENTRY_POINTS)
    brought = {entry.value: entry for entry in plugins if entry.name == model_type}
    if not brought:
        known = ", ".join(sorted({*FAMILIES, *(entry.name for entry in plugins)}))
        raise CheckpointError(f"{where}: model_type {model_type[:80]!r} is not supported; supported: {known}")
    if len(brought) > 1:
        names = " and ".join(sorted(brought))
        raise CheckpointError(f"{where}: family {model_type!r} is brought by {names}: uninstall all but one of them")
    ((value, entry),) = brought.items()
    try:
        family = entry.load()
    except (Exception, SystemExit) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{where}: family {model_type!r}: {value} cannot be imported ({why[:300]}): mend or update its package"
        ) from error
    if not isinstance(family, Family):
        raise CheckpointError(
            f"{where}: family {model_type!r}: {value} is a {type(family).__name__}, not a Family: mend its package"
        )
    return family
