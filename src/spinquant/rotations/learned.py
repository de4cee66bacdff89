"""Learned rotations with the spec that they belong to and the record of how they were learned."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from spinquant.compute.hashing import digest
from spinquant.errors import LearningError
from spinquant.plan import CHANNELS
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.rotation import Transform
from spinquant.rotations.serialization import to_save


class _Scored(BaseModel):
    kl: float
    perplexity: float


class _Tokens(BaseModel):
    text: str
    samples: tuple[int, int]
    held_out: str
    judged: tuple[int, int]


class _EndToEnd(BaseModel):
    weights: bool = False


class _Options(BaseModel):
    method: str = ""
    end_to_end: _EndToEnd = _EndToEnd()


class LearnedRecord(BaseModel):
    """The entries of a record that are used when it is read again; further ones are for readers."""

    kept: str
    learned: bool = False
    rotation_of: dict[str, str] = {}
    scores: dict[str, _Scored] = {}
    clips: dict[str, dict[str, float]] = {}
    options: _Options = _Options()
    scheme: dict[str, Any] | None = None
    tokens: _Tokens | None = None
    steps: list[dict[str, Any]] = []
    weights: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class LearnedRotations:
    """Learned rotations of one model: what `learn` and `read_learned` return, for `rotate` and `quantize` to take.

    Attributes:
        rotations: rotations by space name.
        spec: which of R1 to R4 they are, with types and block sizes.
        record: how they were learned: scores of all candidates, the one that was kept, steps, quantization error per
            site before and after, seconds, settings.

    Example:
        >>> from spinquant import Hadamard, LearnedRotations, RotationSpec
        >>> record = {"kept": "start", "rotation_of": {"residual": "R1", "layers.0.value": "R2"}}
        >>> rotations = {"residual": Hadamard(64), "layers.0.value": Hadamard(16)}
        >>> learned = LearnedRotations(rotations, RotationSpec("R1,R2", "hadamard"), record)
        >>> sorted(learned.only(["R2"]).rotations), learned.kept
        (['layers.0.value'], 'start')
    """

    rotations: Mapping[str, Transform]
    spec: RotationSpec
    record: dict[str, Any]

    def digest(self) -> str:
        """A hash of the rotations' tensors: 16 hexadecimal digits."""
        _, tensors = to_save(self.rotations)
        return hashlib.sha256("".join(digest(tensors[name]) for name in sorted(tensors)).encode()).hexdigest()[:16]

    def only(self, names: Sequence[str]) -> "LearnedRotations":
        """The subset for some rotations, such as ["R1", "R2"].

        Raises:
            LearningError: a rotation was not learned, or the record does not state which rotation each space has.
        """
        if not names:
            raise LearningError("no rotation is selected from the learned ones: name at least one, or do not pass them")
        missing = [name for name in names if name not in self.spec.rotations]
        if missing:
            raise LearningError(f"{', '.join(missing)} is asked for, but {', '.join(self.spec.rotations)} was learned")
        of = self.record.get("rotation_of", {})
        # Records of earlier versions name the space of R4 alone, where its channels are scaled too.
        of = {space: of.get(space, of.get(space.removesuffix(CHANNELS))) for space in self.rotations}
        if None in of.values():
            raise LearningError(
                "the record does not state which of R1 to R4 each rotation is: use all of them, or learn again"
            )
        types = {name: self.spec.type_of(name) for name in names}
        sizes = {name: size for name in names if (size := self.spec.block_of(name)) is not None}
        spec = RotationSpec(tuple(names), types, sizes or None, False, self.spec.seed)
        return replace(self, rotations={s: r for s, r in self.rotations.items() if of[s] in (*names, "")}, spec=spec)

    def note(self) -> dict[str, Any]:
        """The record as it is saved with a checkpoint: without timings, and without the steps of single spaces."""
        note = {key: value for key, value in self.record.items() if key not in ("seconds", "local_steps")}
        steps = [{k: v for k, v in step.items() if k != "tokens_per_second"} for step in note.get("steps", ())]
        return {**note, "steps": steps}

    @property
    def kept(self) -> str:
        """Name of the candidate that was kept."""
        return self.record["kept"]
