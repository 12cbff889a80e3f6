"""Programs that the runs of one process share: what differs in the seed alone compiles once."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from models import Classifier

KEPT = 32  # programs, the newest; a grid trains the seeds of a model one after the other
_made: deque[tuple[tuple, Any]] = deque(maxlen=KEPT)


@dataclass(frozen=True)
class Outline:
    """All of a model but the values of its arrays; equal for the seeds of one architecture."""

    structure: nnx.GraphDef
    places: jax.tree_util.PyTreeDef
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, model: Classifier) -> "Outline":
        """Returns the outline of a model, which may hold shapes in place of arrays."""
        structure, arrays = nnx.split(model)
        leaves, places = jax.tree.flatten(arrays)
        return cls(structure, places, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))

    def model(self) -> Classifier:
        """Returns a model with shapes in place of arrays: a program that keeps it keeps none."""
        return nnx.merge(self.structure, jax.tree.unflatten(self.places, self.shapes))


def settings(config: ConfigDict) -> str:
    """Returns all of a run's or phase's config but what no program depends on, as text."""
    return ConfigDict(config.to_dict() | {"seed": 0, "variant": ""}).to_json(sort_keys=True)


def shared(key: tuple, make: Callable[[], Any]) -> Any:
    """Returns what `make()` gave when it was last asked for under an equal key.

    The key names the program and holds all it depends on; its parts need not be hashable.
    """
    for known, program in _made:
        if known == key:
            return program
    _made.append((key, program := make()))
    return program
