"""Load the base model of an adapter or draft head: the original checkpoint, and the rotations applied to it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import safe_open
from torch import Tensor

from spinquant.architectures import family_of, make_plan, module_names
from spinquant.architectures.family import Family
from spinquant.checkpoint.folder import BESIDE, ORIGIN, RECORD, ROTATIONS, folder_of, load_config, read_headers
from spinquant.checkpoint.reader import Source, read_gains
from spinquant.checkpoint.safetensors_io import read_tensors
from spinquant.checkpoint.untrusted import beside, read_file, read_json
from spinquant.compute.values import validated
from spinquant.errors import CheckpointError, RotationError
from spinquant.plan import Plan
from spinquant.rotations.fuse import transform
from spinquant.rotations.rotation import Transform
from spinquant.rotations.serialization import saved

# Rows of the embedding that are compared to identify the original, and the tolerance for rounding to half types.
ROWS, SAME = 64, 0.02
LONGEST_PATH = 1 << 16  # bytes


class _Plan(pydantic.BaseModel):
    spaces: list[dict[str, Any]]


class _Record(pydantic.BaseModel):
    plan: _Plan
    source: str | None = None


@dataclass(frozen=True)
class BaseModel:
    """The base model of an adapter: original checkpoint, plan and rotations. name: the rotated folder, as given."""

    name: str
    config: Any
    source: Source
    plan: Plan
    rotations: Mapping[str, Transform]

    @cached_property
    def family(self) -> Family:
        """The model's architecture family."""
        family = family_of(self.config)
        assert family is not None  # or there would be no plan
        return family

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Names of tensors in the plan by their names in the module; a tied head has a name too."""
        own = module_names(self.family, self.source.tensors)
        return {**module_names(self.family, [tie.tensor for tie in self.plan.ties]), **own}

    def module_name(self, name: str) -> str:
        """The module's name of a tensor whose name may be that of an older version of transformers."""
        return next(iter(module_names(self.family, [name])))

    @cached_property
    def gains(self) -> Mapping[str, Tensor]:
        """The weights of the model's norms, by name."""
        return read_gains(self.source, self.plan)

    @property
    def hidden_size(self) -> int:
        """Size of the residual space."""
        return self.plan.space["residual"].size

    def original(self, name: str) -> Tensor:
        """A tensor of the plan before rotation."""
        return self.source.whole(self._held(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the plan."""
        return self.source.tensors[self._held(name)].entry.shape

    def _held(self, name: str) -> str:
        return name if name in self.source.tensors else self.plan.tied[name]


@contextmanager
def open_base_model(rotated: str | Path, model: str | Path | None = None) -> Iterator[BaseModel]:
    """Open the base model of a rotated folder: `model`, or the original model that the folder's record names.

    Raises CheckpointError for a folder without record or rotations, and RotationError if the model is not the original.
    """
    folder = folder_of(rotated)
    record = read_record(folder)
    origin = model or _origin(folder, record)
    config = load_config(origin)
    with closing(Source(folder_of(origin), config)) as source:
        plan = make_plan(config, source.shapes)
        base = BaseModel(str(rotated), config, source, plan, rotations_of(folder))
        spaces = [asdict(space) for space in plan.spaces]
        if spaces != record["plan"]["spaces"] or not _is_original(base, folder):
            raise RotationError(
                f"{str(origin)!r} is not the model that {folder} was made from: pass the original with --model"
            )
        yield base


def rotations_of(folder: Path) -> dict[str, Transform]:
    """The rotations of a rotated folder, by space. Raises CheckpointError or RotationError if they cannot be read."""
    return saved(read_record(folder), read_tensors(beside(folder, ROTATIONS))[0])


def _origin(folder: Path, record: Mapping[str, Any]) -> str | Path:
    """The original of a rotated folder: a local folder that is noted beside the record, or the record's Hub id."""
    noted, source = beside(folder, ORIGIN), record.get("source")
    if noted.is_file() and (path := Path(os.fsdecode(read_file(noted, LONGEST_PATH)))).is_dir():
        return path
    if source is None:
        raise CheckpointError(f"the record of {folder} does not name the original model: pass it with --model")
    if source == Path(source).name:
        raise CheckpointError(f"the original model {source!r} of {folder} is not where it was: pass it with --model")
    return source


@torch.no_grad()
def _is_original(base: BaseModel, folder: Path) -> bool:
    """Whether the rotated first rows of the embedding equal those of the rotated folder."""
    name = base.names[base.family.embedding]
    info = read_headers(folder).get(name)
    stored = base.source.tensors[name].entry
    if info is None or info.shape != stored.shape:
        return False
    with safe_open(folder / info.file, framework="pt") as file:
        found = file.get_slice(name)[:ROWS].double()
    rows = base.source.read(name, 0, len(found), torch.empty(stored.end - stored.start, dtype=torch.uint8))
    expected = transform(name, rows.double(), base.plan, base.gains, base.rotations)
    return bool((found - expected).norm() <= SAME * expected.norm())


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of how a folder was rotated. Raises CheckpointError if there is none."""
    for name in (RECORD, ROTATIONS):
        if not (folder / BESIDE / name).is_file():
            raise CheckpointError(f"{folder} has no {BESIDE}/{name}: it was not rotated by spinquant")
    found = read_json(beside(folder, RECORD))
    validated(_Record, found, str(folder / BESIDE / RECORD), CheckpointError)
    return found
