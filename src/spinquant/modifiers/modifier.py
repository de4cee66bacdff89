"""`SpinQuantModifier`: rotate a model from Python, or from a recipe of llm-compressor beside its other modifiers.

The modifier is a thin facade: mappings and transform configs are resolved into a plan and rotations (`resolve.py`),
which `entrypoints/in_memory.py` applies to the model; `learning/parametrization.py` makes them trainable parameters.
It needs no llm-compressor, and imports it only if it is loaded already (`llmcompressor.py`).
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
from spinquant.modifiers.resolve import ModifierRequest, Resolved, resolve
from spinquant.modifiers.transform_config import TorchDtype, TransformConfig, TransformType
from spinquant.online.queries import ATTENTIONS
from spinquant.plan import Plan
from spinquant.rotation_names import parse_rotation_names
from spinquant.rotations.factory import RotationSpec

RotationName = Literal["R1", "R2", "R3", "R4"]
PEER = "llmcompressor"
ADAPTER = "spinquant.modifiers.llmcompressor"  # imported by name: it imports this module


class SpinQuantModifier(BaseModel):
    """Rotate a model with R1 to R4, alone (`apply`) or as a modifier in a recipe of llm-compressor.

    R1 and R2 are offline rotations, fused into the weights; R3 and R4 are online rotations, applied at inference.

    Attributes:
        requires_calibration_data: False, rotations need no calibration data. This field and those up to `ended_` are
            those of every modifier of llm-compressor.
        index: Position in the recipe.
        group: Name of the modifier's group in the recipe.
        start: Training step at which the modifier starts; at 0 or less it starts when it is initialized. Default: none.
        end: Training step at which the modifier ends. Default: none.
        update: Training steps between updates; it has no effect here.
        initialized_: Whether `initialize` has succeeded.
        finalized_: Whether `finalize` has succeeded.
        started_: Whether `on_start` was called.
        ended_: Whether `on_end` was called.
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

    _resolved: Resolved | None = PrivateAttr(None)
    _training: Trainable | None = PrivateAttr(None)
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
        """Make this an instance of llm-compressor's Modifier if llm-compressor is loaded."""
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
            raise RotationError("there is no result yet, since no rotations are fused: call finalize (or apply) first")
        return self._result

    def apply(self, model: Any, train: Callable[[Any], object] | None = None) -> Result:
        """Run the whole lifecycle on one model, in place.

        Args:
            model: A causal language model of transformers.
            train: Called with the model while the learnable rotations are its parameters; only with `learnable`.

        Returns:
            The rotated model and what was done to it, for `spinquant.save`.

        Raises:
            RotationError: Only one of `train` and `learnable` is given, or a mapping does not fit the model.
            ProofError: Rotating would change the model's function.
        """
        state = SimpleNamespace(model=model)
        config = self.transform_config
        learns = any(s.requires_grad for s in config.config_groups.values()) if config else self.learnable
        if (train is not None) != learns:
            raise RotationError(
                "`train` and learnable=True need each other: give both, or call initialize, on_start and finalize "
                "around your own training"
            )
        self.initialize(state)
        self.on_start(state)
        if train is not None:
            train(model)
        self.on_end(state)
        self.finalize(state)
        return self.result

    def initialize(self, state: Any, **kwargs: Any) -> None:
        """Call `on_initialize`, and `on_start` if the field `start` is 0 or less.

        Raises RotationError if called twice.
        """
        if self.initialized_ or self.finalized_:
            raise RotationError("this modifier has been initialized already: make a new one for every model")
        self.initialized_ = self.on_initialize(state, **kwargs)
        if self.start is not None and self.start <= 0 and (self.end is None or self.end > 0):
            self.on_start(state, **kwargs)

    def finalize(self, state: Any, **kwargs: Any) -> None:
        """Call `on_finalize`. Raises RotationError before `initialize`, and if called twice."""
        if self.finalized_ or not self.initialized_:
            raise RotationError(
                "this modifier has been finalized already: make a new one for every model"
                if self.finalized_
                else "this modifier has no model yet: call initialize first"
            )
        self.finalized_ = self.on_finalize(state, **kwargs)

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        """Infer mappings, make the transform config, and verify both on a tiny model; the model is not changed.

        Args:
            state: A state of llm-compressor, another object with the model as `.model`, or the model itself.
            kwargs: Ignored.

        Returns:
            True.

        Raises:
            ArchitectureError: The architecture is unknown, and the mappings are not complete.
            RotationError: Mappings or config do not fit the model.
            ProofError: They would change the model's function.
        """
        # compressed-tensors looks up the attention function in transformers' registry, which lacks eager.
        attentions = [name for name in ATTENTIONS if not (name == "eager" and _in_llm_compressor(state))]
        given = (self.mappings, self.norm_mappings, self.transform_config)
        wanted = ModifierRequest(self._spec(), self.learnable, self.precision, *given, attentions=attentions)
        resolved = resolve(_model_of(state), wanted)
        self._resolved, self.mappings, self.norm_mappings = resolved, resolved.mappings, resolved.norm_mappings
        self.transform_config = resolved.config
        return True

    def on_start(self, state: Any, event: Any = None, **kwargs: Any) -> None:
        """Fuse norms and offline rotations, and attach online ones; learnable ones become parameters instead.

        A second call has no effect. Embeddings are not centered: with an RMSNorm that would change the function.
        """
        resolved, model = self._require_resolved(), _model_of(state)
        if self._done:
            return
        if learned := resolved.learned():
            _check_unquantized(model, resolved.plan)
            if _in_llm_compressor(state):
                from spinquant.modifiers.compressed_transforms import check_in_place

                check_in_place(model)
            how: dict[str, Any] = {"online": resolved.online(), "precision": self.precision}
            self._training = begin_training(model, resolved.plan, resolved.rotations, learned, **how)
        else:
            self._install(state, model, resolved)
        self._done = self.started_ = True

    def on_calibration_start(self, state: Any, event: Any = None, **kwargs: Any) -> None:
        """Call `on_start`: its name in llm-compressor 0.14."""
        self.on_start(state, event, **kwargs)

    def on_event(self, state: Any, event: Any = None, **kwargs: Any) -> None:
        """Do nothing; llm-compressor calls this with every event."""

    def on_update(self, state: Any, event: Any = None, **kwargs: Any) -> None:
        """Do nothing; llm-compressor calls this for every batch, and the optimizer trains the rotations."""

    def on_sequential_epoch_end(self, state: Any, event: Any = None, modules: Any = None, **kwargs: Any) -> None:
        """Do nothing; llm-compressor calls this after every calibrated block, and the model is rotated before that."""

    def on_calibration_end(self, state: Any, event: Any = None, **kwargs: Any) -> None:
        """Call `on_end`: its name in llm-compressor 0.14."""
        self.on_end(state, event, **kwargs)

    def on_end(self, state: Any, event: Any = None, **kwargs: Any) -> None:
        """Mark the end of calibration or training; learnable rotations stay parameters until `finalize`."""
        self.ended_ = True

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:
        """Fuse learned rotations. Raises RotationError if `on_start` was never called."""
        if not self._done:
            raise RotationError(
                "this modifier was finalized before it was started, so the model is not rotated: call on_start first"
            )
        if self._training is not None:
            learned, self._training = end_training(self._training), None
            self._install(state, _model_of(state), replace(self._require_resolved(), rotations=learned))
        return True

    def update_event(self, state: Any, event: Any, **kwargs: Any) -> None:
        """Dispatch an event of llm-compressor: calibration events by type, batch events by `start` and `end`."""
        if not self.initialized_ or self.finalized_:
            raise RotationError(
                "this modifier received an event before it was initialized, or after it was finalized: call initialize "
                "first, and finalize last"
            )
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
        """Whether the index of an event is in [start, end)."""
        now = event.current_index
        return self.start is not None and self.start <= now and (self.end is None or now < self.end)

    def should_end(self, event: Any) -> bool:
        """Whether the index of an event is `end` or larger."""
        return self.end is not None and event.current_index >= self.end

    def _spec(self) -> RotationSpec:
        return RotationSpec(
            tuple(self.rotations), self.transform_type, self.transform_block_size, self.randomize, self.seed
        )

    def _require_resolved(self) -> Resolved:
        if self._resolved is None:
            raise RotationError("this modifier has no model yet: call initialize or on_initialize first")
        return self._resolved

    def _install(self, state: Any, model: Any, resolved: Resolved) -> None:
        if _in_llm_compressor(state):
            from spinquant.modifiers.compressed_transforms import install_compressed

            install_compressed(
                model, resolved.plan, resolved.rotations, resolved.group_of, resolved.config, self.precision
            )
        else:
            options = Options(precision=self.precision)
            install(model, resolved.plan, resolved.rotations, self._spec(), online=resolved.online(), options=options)
        notes = {"transform_config": resolved.config.model_dump()}
        self._result = Result(
            model, resolved.plan, self._spec(), resolved.rotations, twin=resolved.deviation, notes=notes
        )


def _model_of(state: Any) -> Any:
    # A causal language model has a `.model` of its own, which lacks the head.
    model = state if isinstance(state, nn.Module) else getattr(state, "model", None)
    if not isinstance(model, nn.Module):
        raise RotationError(f"the state has no model: `.model` is {type(model).__name__}, expected an nn.Module")
    return model


def _in_llm_compressor(state: Any) -> bool:
    return type(state).__module__.partition(".")[0] == PEER


def _check_unquantized(model: Any, plan: Plan) -> None:
    for name in (name for group in plan.linears for name in group):
        if getattr(model.get_submodule(name), "quantization_scheme", None) is not None:
            raise RotationError(
                f"{name} has a quantization scheme while its rotation is trained, and its quantized weight would be "
                "lost: train the rotations in a run of their own, finalize, then quantize"
            )
