"""SpinQuantModifier: llm-compressor's recipe interface to this library's rotations.

A thin facade: mappings and transform configs are resolved into a plan and its rotations (`resolve.py`), which
`entrypoints.in_memory.install` applies to the model; `learning/parametrization.py` makes them trainable parameters. It
works alone, and in llm-compressor's recipes beside its own modifiers (`llmcompressor.py`); llm-compressor is never
imported here unless it is in use already.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from torch import nn

from spinquant.entrypoints.in_memory import install
from spinquant.entrypoints.result import Options, Result
from spinquant.errors import RotationError
from spinquant.learning.parametrization import Trainable, begin_training, end_training
from spinquant.modifiers.mappings import NormMapping, SpinQuantMapping
from spinquant.modifiers.resolve import ModifierRequest, Resolved, prepare
from spinquant.modifiers.transform_config import TorchDtype, TransformConfig, TransformType
from spinquant.online.hooks import ATTENTIONS
from spinquant.plan import Plan, parse_rotation_names
from spinquant.rotations.factory import RotationSpec

RotationName = Literal["R1", "R2", "R3", "R4"]
PEER = "llmcompressor"
ADAPTER = "spinquant.modifiers.llmcompressor"  # imported by name: it imports this module


class SpinQuantModifier(BaseModel):
    """Rotate a model with R1 to R4, alone (`apply`) or as a modifier in a recipe of llm-compressor.

    R1 and R2 are offline rotations, fused into the weights; R3 and R4 are online rotations, applied at inference.

    Attributes:
        rotations: Any of R1, R2, R3, R4, in any case. Default: R1 and R2.
        transform_type: `hadamard` (the default), `random-hadamard` or `random-matrix` (Haar orthogonal). The orders
            that have a Hadamard matrix are in `docs/reference/hadamard-orders.md`.
        randomize: A different rotation for every layer. Default: False.
        learnable: Make the rotations parameters of the model that train with any optimizer, until `finalize` fuses
            them. Default: False.
        precision: Dtype of fusing and of online rotations. Default: float64.
        transform_block_size: Order of the diagonal blocks of every rotation. Default: one block per space.
        mappings: The module of each role; roles that are left out are inferred.
        norm_mappings: The linears that read each norm; inferred if left out.
        transform_config: Replaces the fields above that describe rotations. Set by `on_initialize` if None.
        seed: Of everything random. Default: 0.

    The other fields (`start`, `end`, `index`, ...) are those of every modifier of llm-compressor.

    Raises:
        pydantic.ValidationError: A field has an invalid value. The methods raise subclasses of SpinquantError.

    Example:
        >>> import spinquant
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> modifier = spinquant.SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard")
        >>> result = modifier.apply(model)
        >>> modifier.finalized, sorted(modifier.transform_config.config_groups)
        (True, ['R1', 'R2'])
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    requires_calibration_data: bool = False
    index: int | None = None
    group: str | None = None
    start: float | None = None
    end: float | None = None
    update: float | None = None
    initialized_: bool = False
    finalized_: bool = False
    started_: bool = False
    ended_: bool = False

    rotations: list[RotationName] = Field(default_factory=lambda: cast(list[RotationName], ["R1", "R2"]))
    transform_type: TransformType = "hadamard"
    randomize: bool = False
    learnable: bool = False
    precision: TorchDtype = torch.float64
    transform_block_size: int | None = Field(default=None, gt=0)
    mappings: SpinQuantMapping | None = Field(default=None, repr=False)
    norm_mappings: list[NormMapping] | None = Field(default=None, repr=False)
    transform_config: TransformConfig | None = Field(default=None, repr=False)
    seed: int = 0

    _work: Resolved | None = PrivateAttr(None)
    _learning: Trainable | None = PrivateAttr(None)
    _done: bool = PrivateAttr(False)
    _result: Result | None = PrivateAttr(None)

    @field_validator("rotations", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return list(parse_rotation_names(value))

    @field_validator("mappings", "transform_config", mode="before")
    @classmethod
    def _as_data(cls, value: Any) -> Any:
        # The equivalent classes of llm-compressor and compressed-tensors are accepted too.
        return value.model_dump() if isinstance(value, BaseModel) else value

    @field_validator("norm_mappings", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [v.model_dump() if isinstance(v, BaseModel) else v for v in value] if value is not None else None

    @model_validator(mode="after")
    def _possible(self) -> "SpinQuantModifier":
        self._spec()
        return self

    def model_post_init(self, context: Any) -> None:
        """Make this an instance of llm-compressor's Modifier if llm-compressor is in use."""
        super().model_post_init(context)
        if f"{PEER}.modifiers" in sys.modules:
            importlib.import_module(ADAPTER).adopt(self)

    @property
    def initialized(self) -> bool:
        """Whether `initialize` has succeeded."""
        return self.initialized_

    @property
    def finalized(self) -> bool:
        """Whether `finalize` has succeeded."""
        return self.finalized_

    @property
    def result(self) -> Result:
        """The rotated model, to pass to `spinquant.save`. Raises RotationError before the rotations are fused."""
        if self._result is None:
            raise RotationError("there is no result yet: the rotations are not fused. Call finalize (or apply) first")
        return self._result

    def apply(self, model: Any, train: Callable[[Any], object] | None = None) -> Result:
        """Run the whole lifecycle on one model, in place.

        Args:
            model: A causal language model of transformers.
            train: Called with the model while the learnable rotations are its parameters; only with `learnable`.

        Returns:
            The rotated model and what was done to it, for `spinquant.save`.

        Raises:
            RotationError: `train` is given without `learnable` or the other way round, or a mapping does not fit.
            ProofError: Rotating would change the function of the model.
        """
        state = SimpleNamespace(model=model)
        config = self.transform_config
        learns = any(s.requires_grad for s in config.config_groups.values()) if config else self.learnable
        if (train is not None) != learns:
            raise RotationError(
                "`train` is called while rotations are being learned: give it together with learnable=True, or call "
                "initialize, on_start and finalize around your own training"
            )
        self.initialize(state)
        self.on_start(state)
        if train is not None:
            train(model)
        self.on_end(state)
        self.finalize(state)
        return self.result

    def initialize(self, state: Any, **kwargs: Any) -> None:
        """`on_initialize`, once; and `on_start`, where the field `start` is 0 or less."""
        if self.initialized_ or self.finalized_:
            raise RotationError("this modifier has been initialized already: make a new one for every model")
        self.initialized_ = self.on_initialize(state, **kwargs)
        if self.start is not None and self.start <= 0 and (self.end is None or self.end > 0):
            self.on_start(state, **kwargs)

    def finalize(self, state: Any, **kwargs: Any) -> None:
        """`on_finalize`, once, after `initialize`."""
        if self.finalized_ or not self.initialized_:
            raise RotationError(
                f"this modifier {'has been finalized already' if self.finalized_ else 'has no model yet'}"
            )
        self.finalized_ = self.on_finalize(state, **kwargs)

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        """Infer mappings, make the transform config, and prove them on a tiny model; the model is not changed.

        Raises ArchitectureError for an unknown architecture without complete mappings, RotationError for mappings and
        configs that do not fit the model, ProofError if they would change its function.
        """
        # compressed-tensors looks the function up in transformers' registry, which lacks eager.
        attentions = [name for name in ATTENTIONS if not (name == "eager" and _in_llm_compressor(state))]
        given = (self.mappings, self.norm_mappings, self.transform_config)
        wanted = ModifierRequest(self._spec(), self.learnable, self.precision, *given, attentions=attentions)
        work = prepare(_model_of(state), wanted)
        self._work, self.mappings, self.norm_mappings = work, work.mappings, work.norm_mappings
        self.transform_config = work.config
        return True

    def on_start(self, state: Any, event: Any = None, **kwargs: Any) -> None:
        """Fuse norms and offline rotations and attach online ones; learnable ones become parameters instead.

        A second call does nothing. Embeddings are not centered: with an RMSNorm that would change the function.
        """
        work, model = self._ready(), _model_of(state)
        if self._done:
            return
        if learned := work.learned():
            _check_unquantized(model, work.plan)
            if _in_llm_compressor(state):
                from spinquant.modifiers.compressed_transforms import check_in_place

                check_in_place(model)
            online, dtype = work.online(), self.precision
            self._learning = begin_training(model, work.plan, work.rotations, learned, online=online, precision=dtype)
        else:
            self._install(state, model, work)
        self._done = self.started_ = True

    def on_calibration_start(self, state: Any, event: Any = None, **kwargs: Any) -> None:
        """`on_start`, as llm-compressor 0.14 calls it."""
        self.on_start(state, event, **kwargs)

    def on_event(self, state: Any, event: Any = None, **kwargs: Any) -> None:
        """Does nothing: called by llm-compressor with every event."""

    def on_update(self, state: Any, event: Any = None, **kwargs: Any) -> None:
        """Does nothing: called by llm-compressor at every batch; the optimizer trains the rotations."""

    def on_sequential_epoch_end(self, state: Any, event: Any = None, modules: Any = None, **kwargs: Any) -> None:
        """Does nothing: called by llm-compressor after each calibrated block; the model is rotated before the first."""

    def on_calibration_end(self, state: Any, event: Any = None, **kwargs: Any) -> None:
        """`on_end`, as llm-compressor 0.14 calls it."""
        self.on_end(state, event, **kwargs)

    def on_end(self, state: Any, event: Any = None, **kwargs: Any) -> None:
        """Mark the end of calibration or training; learnable rotations stay parameters until `finalize`."""
        self.ended_ = True

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:
        """Fuse learned rotations. Raises RotationError if `on_start` was never called."""
        if not self._done:
            raise RotationError("finalized before it was started: the model is not rotated. Call on_start first")
        if self._learning is not None:
            learned, self._learning = end_training(self._learning), None
            self._install(state, _model_of(state), replace(self._ready(), rotations=learned))
        return True

    def update_event(self, state: Any, event: Any, **kwargs: Any) -> None:
        """Dispatch an event of llm-compressor: calibration events by type, batch events by `start` and `end`."""
        if not self.initialized_ or self.finalized_:
            raise RotationError("an event reached this modifier before it was initialized, or after it was finalized")
        kind = getattr(event.type_, "value", event.type_)
        self.on_event(state, event, **kwargs)
        if kind == "calibration_start":
            self.on_calibration_start(state, event, **kwargs)
        elif kind == "sequential_epoch_end":
            self.on_sequential_epoch_end(state, event, **kwargs)
        elif kind == "calibration_end":
            self.on_calibration_end(state, event, **kwargs)
        else:
            if kind == "batch_start" and not self.started_ and self.should_start(event):
                self.on_start(state, event, **kwargs)
            elif kind == "batch_end" and not self.ended_ and self.should_end(event):
                self.on_end(state, event, **kwargs)
            if self.started_:
                self.on_update(state, event, **kwargs)

    def should_start(self, event: Any) -> bool:
        """Whether a training event lies between `start` and `end`."""
        now = event.current_index
        return self.start is not None and self.start <= now and (self.end is None or now < self.end)

    def should_end(self, event: Any) -> bool:
        """Whether a training event lies at `end` or after it."""
        return self.end is not None and event.current_index >= self.end

    def _spec(self) -> RotationSpec:
        return RotationSpec(
            tuple(self.rotations), self.transform_type, self.transform_block_size, self.randomize, self.seed
        )

    def _ready(self) -> Resolved:
        if self._work is None:
            raise RotationError("this modifier has no model yet: call initialize or on_initialize first")
        return self._work

    def _install(self, state: Any, model: Any, work: Resolved) -> None:
        if _in_llm_compressor(state):
            from spinquant.modifiers.compressed_transforms import install_compressed

            install_compressed(model, work.plan, work.rotations, work.group_of, work.config, self.precision)
        else:
            options = Options(precision=self.precision)
            install(model, work.plan, work.rotations, self._spec(), online=work.online(), options=options)
        notes = {"transform_config": work.config.model_dump()}
        self._result = Result(model, work.plan, self._spec(), work.rotations, twin=work.deviation, notes=notes)


def _model_of(state: Any) -> Any:
    # A causal LM has a `.model` too, which lacks the head.
    model = state if isinstance(state, nn.Module) else getattr(state, "model", None)
    if not isinstance(model, nn.Module):
        raise RotationError(f"the state has no model: its `.model` is {type(model).__name__}, expected an nn.Module")
    return model


def _in_llm_compressor(state: Any) -> bool:
    return type(state).__module__.partition(".")[0] == PEER


def _check_unquantized(model: Any, plan: Plan) -> None:
    for name in (name for group in plan.linears for name in group):
        if getattr(model.get_submodule(name), "quantization_scheme", None) is not None:
            raise RotationError(
                f"{name} has a quantization scheme while its rotation is being learned, and the quantized weight would "
                "be lost: learn the rotations in a run of their own, finalize, then quantize"
            )
