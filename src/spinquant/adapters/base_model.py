"""The rotated model that something rides along with: its original, and the rotations that it was given."""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from spinquant.architectures import family_of, make_plan, module_names
from spinquant.architectures.family import Family
from spinquant.checkpoint.folder import BESIDE, RECORD, ROTATIONS, folder_of, load_config, read_headers
from spinquant.checkpoint.reader import Source, read_gains
from spinquant.errors import CheckpointError, RotationError
from spinquant.plan import Plan
from spinquant.rotations.fuse import transform
from spinquant.rotations.rotation import Rotation
from spinquant.rotations.serialization import saved

# Rows that are compared to tell whether a model is the original, and what rounding to half types moves them by.
ROWS, SAME = 64, 0.02


@dataclass(frozen=True)
class Target:
    """A model before rotating, as a checkpoint, and how it is rotated. name: of the rotated folder."""

    name: str
    config: Any
    source: Source
    plan: Plan
    rotations: Mapping[str, Rotation]

    @cached_property
    def family(self) -> Family:
        """The table that explains the model."""
        family = family_of(self.config)
        assert family is not None  # or there would be no plan
        return family

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Names of tensors in the plan, by their names in the module; a tied head under its own."""
        own = module_names(self.family, self.source.tensors)
        return {**module_names(self.family, [tie.tensor for tie in self.plan.ties]), **own}

    def module_name(self, name: str) -> str:
        """The name that the module gives a tensor today, of one that older versions may have given it."""
        return next(iter(module_names(self.family, [name])))

    @cached_property
    def gains(self) -> Mapping[str, Tensor]:
        """The weights of the model's norms, by name."""
        return read_gains(self.source, self.plan)

    @property
    def hidden_size(self) -> int:
        """Of the residual space."""
        return self.plan.space["residual"].size

    def original(self, name: str) -> Tensor:
        """A tensor of the plan as it was before rotating."""
        return self.source.whole(name if name in self.source.tensors else self.plan.tied[name])


@contextmanager
def target_of(rotated: str | Path, model: str | Path | None = None) -> Iterator[Target]:
    """The target that a rotated folder is, with the original it was made of: `model`, or the one that its record names.

    Raises CheckpointError for a folder without record or rotations, and RotationError when the original has another
    plan than the record.
    """
    folder = folder_of(rotated)
    record = read_record(folder)
    origin = model or record.get("source")
    if origin is None:
        raise CheckpointError(f"the record of {folder} does not name the model it was made of: say which, with --model")
    config = load_config(origin)
    with closing(Source(folder_of(origin), config)) as source:
        plan = make_plan(config, source.shapes)
        rotations = saved(record, load_file(folder / BESIDE / ROTATIONS))
        target = Target(str(rotated), config, source, plan, rotations)
        spaces = [asdict(space) for space in plan.spaces]
        if spaces != record["plan"]["spaces"] or not _is_original(target, folder):
            raise RotationError(
                f"{str(origin)!r} is not what {folder} was made of. Say which model it was, with --model"
            )
        yield target


@torch.no_grad()
def _is_original(target: Target, folder: Path) -> bool:
    """Whether the first rows of the embedding are, rotated, those of the rotated folder."""
    name = target.names[target.family.embedding]
    info = read_headers(folder).get(name)
    stored = target.source.tensors[name].entry
    if info is None or info.shape != stored.shape:
        return False
    with safe_open(folder / info.file, framework="pt") as file:
        found = file.get_slice(name)[:ROWS].double()
    rows = target.source.read(name, 0, len(found), torch.empty(stored.end - stored.start, dtype=torch.uint8))
    expected = transform(name, rows.double(), target.plan, target.gains, target.rotations)
    return bool((found - expected).norm() <= SAME * expected.norm())


def read_record(folder: Path) -> dict[str, Any]:
    """How a folder came about. Raises CheckpointError when it does not say."""
    for name in (RECORD, ROTATIONS):
        if not (folder / BESIDE / name).is_file():
            raise CheckpointError(f"{folder} has no {BESIDE}/{name}: it is no folder that spinquant rotated")
    try:
        return json.loads((folder / BESIDE / RECORD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / BESIDE / RECORD} is not valid JSON: {error}") from None
