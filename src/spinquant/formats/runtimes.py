"""Table of the formats, rotations and schemes that each runtime supports, with the evidence for every claim.

The evidence is a test of this project or a source. A model with a rotation that the runtime does not apply gives wrong
outputs, and one with a scheme without a kernel does not load; `check_runtime` refuses both before work starts and names
an alternative. R1 and R2 are in the weights, so any runtime that loads the folder supports them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from spinquant.errors import RotationError, SchemeError
from spinquant.plan import Plan
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.rotation_names import MERGEABLE, ONLINE, ONLINE_R1, ROTATION_NAMES

if TYPE_CHECKING:  # it imports torch, and the command line reads the names of the runtimes without
    from spinquant.rotations.factory import RotationSpec


@dataclass(frozen=True)
class Claim:
    """Whether a runtime supports something, and the evidence: a `test` of this project, or a source in `cites`."""

    runs: bool
    test: str = ""
    cites: str = ""

    @property
    def backing(self) -> str:
        """The evidence as text."""
        return f"test: {self.test}" if self.test else self.cites


@dataclass(frozen=True)
class Runtime:
    """What one runtime supports.

    format: folder format to write for it, None if spinquant writes none. how: how to use the folder. rotations,
    schemes: claims by name; what is not named is unsupported, for the reason `otherwise`. r4_bases: orders of R4 are
    one of these times a power of two, () for any order. biased: whether a linear with a bias may be rotated online.
    types: transform types required of an online rotation. ignored_cache: reason and alternative if the libraries that
    are installed would leave a quantized KV cache at 16 bits.
    """

    title: str
    format: str | None
    how: str
    rotations: Mapping[str, Claim]
    schemes: Mapping[str, Claim]
    otherwise: str
    r4_bases: tuple[int, ...] = ()
    biased: bool = True
    types: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignored_cache: Callable[[], tuple[str, str] | None] = lambda: None


def _runs(test: str) -> Claim:
    return Claim(True, test=test)


def _cited(runs: bool, source: str) -> Claim:
    return Claim(runs, cites=source)


def ignored_cache() -> tuple[str, str] | None:
    """(reason, alternative) if the installed compressed-tensors leaves transformers' KV cache at 16 bits, else None."""
    # Imported here: the command line reads the names of the runtimes without torch.
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    try:
        from compressed_tensors.quantization.lifecycle import initialize
    except ImportError:
        return None
    sees: Callable[[Any], bool] | None = getattr(initialize, "is_cached_attention_module", None)
    attention = LlamaAttention(LlamaConfig(hidden_size=8, num_attention_heads=1, num_key_value_heads=1), layer_idx=0)
    if sees is None or sees(attention):
        return None
    return (
        f"compressed-tensors {version('compressed-tensors')} does not find the KV cache of transformers "
        f"{version('transformers')}, and leaves it at 16 bits without a word",
        "transformers 5.23, or --runtime vllm or spinquant",
    )


_VLLM = "vLLM 0.32, model_executor/layers/quantization/compressed_tensors"
_FUSED = "tests/formats/test_native.py::test_without_spinquant_only_plain_folders_load"
_NATIVE = "tests/formats/test_native.py::test_loading_gives_the_same_logits_to_the_last_bit"
_READ = "tests/formats/test_compressed_tensors.py::test_transformers_computes_the_same_with_compressed_tensors_alone"
_REFUSED = "tests/formats/test_compressed_tensors.py::test_transformers_refuses_online_rotations"
_TRANSFORM = f"{_VLLM}/transform: hadacore for type hadamard, else a dense product; no tensor parallel"
INPUTS = ("R4", ONLINE_R1)  # at the inputs of linears
_STATIC = "tests/formats/test_compressed_tensors.py::test_transformers_computes_the_same_with_static_ranges"
_PLAIN_ONLY = "it reads plain 16-bit folders and quantizes by itself: write R1 and R2 alone (--format hf)"


def _fused(test: str = "", cites: str = "") -> dict[str, Claim]:
    return {name: Claim(True, test, cites) for name in MERGEABLE}


def _plain(title: str, how: str, *, test: str = "", cites: str = "") -> Runtime:
    return Runtime(title, "hf", how, _fused(test, cites), {"none": Claim(True, test, cites)}, _PLAIN_ONLY)


_VLLM_CPU_SCHEMES = {
    "none": _runs("clients: vllm R1+R2"),
    "W8A8": _runs("clients: vllm W8A8"),
    "W4A8": _runs("clients: vllm W4A8+R4"),
    "W4A16": _runs("clients: vllm W4A16"),
}
_GPU = f"{_VLLM}/schemes, capability 75 and up; not run here"

RUNTIMES: Mapping[str, Runtime] = {
    "spinquant": Runtime(
        "transformers with spinquant imported",
        "native",
        "spinquant.load(folder), or from_pretrained after `import spinquant`",
        {name: _runs(_NATIVE) for name in ROTATION_NAMES},
        {"any": _runs("tests/formats/test_native.py::test_schemes_and_dtypes")},
        "",
    ),
    "transformers": Runtime(
        "transformers",
        "hf",
        "AutoModelForCausalLM.from_pretrained(folder)",
        {
            **_fused(_FUSED),
            **dict.fromkeys(ONLINE, Claim(False, _FUSED)),
        },
        {"none": _runs(_FUSED)},
        "transformers alone has no quantized linears: use --runtime transformers-ct or spinquant",
    ),
    "transformers-ct": Runtime(
        "transformers with compressed-tensors",
        "compressed-tensors",
        "AutoModelForCausalLM.from_pretrained(folder)",
        {
            **_fused("clients: transformers W4A16"),
            **dict.fromkeys(ONLINE, Claim(False, _REFUSED)),
        },
        {
            "none": _runs(_FUSED),
            **{f"W{bits}A16": _runs(_READ) for bits in range(2, 9)},
            **{name: _runs(_READ) for name in ("W8A8", "W4A8", "WFP8A16", "WFP8AFP8", "WNVFP4A16")},
            **{name: _runs(_READ) for name in ("WMXFP4A16", "WMXFP4AMXFP4")},
            **{name: _runs(_STATIC) for name in ("WNVFP4ANVFP4", "KVFP8")},
        },
        "compressed-tensors cannot store it: use --runtime spinquant",
        ignored_cache=ignored_cache,
    ),
    "vllm": Runtime(
        "vLLM on a GPU",
        "compressed-tensors",
        "vllm serve folder",
        {
            **_fused(cites=f"{_VLLM}; the folder is that of vllm-cpu"),
            **dict.fromkeys(INPUTS, _cited(True, _TRANSFORM)),
            "R3": _cited(False, f"{_VLLM}/transform/linear.py reads transforms of linears alone"),
        },
        {
            "none": _cited(True, f"{_VLLM}/transform"),
            **{name: _cited(True, _GPU) for name in ("W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W7A16", "W8A16")},
            **{name: _cited(True, _GPU) for name in ("W8A8", "WFP8A16", "WFP8AFP8", "WNVFP4A16", "WMXFP4AMXFP4")},
            "WNVFP4ANVFP4": _cited(True, f"{_VLLM}/schemes/compressed_tensors_w4a4_nvfp4.py; not run here"),
            "KVFP8": _cited(True, f"{_VLLM}/compressed_tensors.py, validate_kv_cache_scheme; not run here"),
        },
        "vLLM has no kernel for it in compressed-tensors (W4A8 of int8 codes has one on CPUs alone)",
        biased=False,
    ),
    "vllm-cpu": Runtime(
        "vLLM on a CPU",
        "compressed-tensors",
        "vllm serve folder",
        {
            **_fused("clients: vllm R1+R2"),
            **dict.fromkeys(INPUTS, Claim(False, "clients: vllm alone refuses R4")),
            "R3": _cited(False, f"{_VLLM}/transform/linear.py reads transforms of linears alone"),
        },
        _VLLM_CPU_SCHEMES,
        "vLLM has no CPU kernel for it",
        biased=False,
    ),
    "vllm-plugin": Runtime(
        "vLLM on a CPU with spinquant installed beside it",
        "compressed-tensors",
        "pip install spinquant in vLLM's environment, then vllm serve folder",
        {
            **_fused("clients: vllm R1+R2"),
            "R4": _runs("clients: vllm R1+R2+R4"),
            ONLINE_R1: _runs("clients: vllm online-R1+R2+R4"),
            "R3": _runs("clients: vllm R1+R2+R3+R4"),
        },
        _VLLM_CPU_SCHEMES,
        "vLLM has no CPU kernel for it",
        types={"R3": ("hadamard",)},
    ),
    "llama.cpp": _plain("llama.cpp", "convert_hf_to_gguf.py folder", cites="its converter reads Llama-family folders"),
    "onnxruntime-genai": _plain(
        "ONNX Runtime GenAI",
        "python -m onnxruntime_genai.models.builder -i folder -o out -p int4 -e cpu",
        cites="its model builder reads plain folders (0.18)",
    ),
    "openvino": _plain(
        "OpenVINO",
        "optimum-cli export openvino -m folder out",
        cites="its exporters read plain folders and GGUF (2026.4)",
    ),
    "ctranslate2": _plain(
        "CTranslate2",
        "ct2-transformers-converter --model folder --output_dir out",
        test="clients: ctranslate2 R1+R2",
    ),
    "executorch": Runtime(
        "ExecuTorch",
        None,
        "its Llama export takes Meta-named .pth files of int8 codes and float32 scales, which spinquant does not write",
        {
            **_fused(cites="examples/models/llama of ExecuTorch 1.5"),
            "R4": _cited(True, "llama::fast_hadamard_transform of ExecuTorch 1.5; other orders return garbage"),
            "R3": _cited(False, "ExecuTorch 1.5 has no transform of queries and keys"),
            ONLINE_R1: _cited(False, "ExecuTorch 1.5 transforms the input of down_proj alone"),
        },
        {},
        "spinquant writes no folder for ExecuTorch",
        r4_bases=(1,),  # 28 times a power of two runs too, but sqrt(28) too large
        types={"R4": ("hadamard",)},
    ),
}


def scheme_names(scheme: Scheme) -> tuple[str, ...]:
    """Names of a scheme in the table, without group sizes: of its linears ("none"), then of a quantized KV cache."""

    def part(letter: str, quantizer: Quantizer | None) -> str:
        if quantizer is None:
            return "A16" if letter == "A" and scheme.weights else ""
        return f"{letter}{quantizer.bits if quantizer.kind == 'int' else quantizer.kind.upper()}"

    # transformers loads no zero points of groups (compressed-tensors 0.19); other runtimes were not tested with them.
    asymmetric = scheme.weights is not None and not scheme.weights.symmetric
    linears = part("W", scheme.weights) + part("A", scheme.activations) + ("_ASYM" if asymmetric else "")
    return (linears or "none", *([part("KV", scheme.kv)] if scheme.kv else []))


def runtime_rows(
    name: str, spec: "RotationSpec", scheme: Scheme | None = None, plan: Plan | None = None
) -> list[dict[str, Any]]:
    """One dict per rotation and part of the scheme: whether the runtime supports it, why, and the alternative."""
    runtime = runtime_of(name)
    rows = []
    for rotation in spec.rotations:
        claim = runtime.rotations.get(rotation, Claim(False, cites=runtime.otherwise))
        limit = _limit(runtime, rotation, spec, plan) if claim.runs else None
        instead = None
        if not claim.runs:
            instead = _without(rotation, spec, runtime)
        elif limit:
            instead = limit[1]
        rows.append(
            {
                "what": rotation,
                "runs": claim.runs and limit is None,
                "why": limit[0] if limit else claim.backing,
                "instead": instead,
            }
        )
    for listed in scheme_names(scheme) if scheme is not None else ():
        claim = runtime.schemes.get(listed) or runtime.schemes.get("any") or Claim(False, cites=runtime.otherwise)
        instead = None if claim.runs else f"{name} runs {', '.join(runtime.schemes) or 'nothing'}"
        why, ignored = claim.backing, runtime.ignored_cache() if claim.runs and listed.startswith("KV") else None
        if ignored:
            why, instead = ignored
        rows.append({"what": listed, "runs": claim.runs and not ignored, "why": why, "instead": instead})
    return rows


def _without(rotation: str, spec: "RotationSpec", runtime: Runtime) -> str:
    # R1 runs wherever a folder loads, if not online.
    names = ("R1" if name == ONLINE_R1 == rotation else name for name in spec.rotations)
    kept = [name for name in dict.fromkeys(names) if runtime.rotations.get(name, Claim(False)).runs]
    fused = " without --online" if rotation == ONLINE_R1 else ""
    able = [n for n, other in RUNTIMES.items() if other.rotations.get(rotation, Claim(False)).runs and other.format]
    return f"--rotations {','.join(kept) or 'none'}{fused}, or --runtime {' or '.join(able)}"


def _limit(runtime: Runtime, rotation: str, spec: "RotationSpec", plan: Plan | None) -> tuple[str, str] | None:
    """(reason, alternative) if the runtime does not support this use of a rotation, else None."""
    types = runtime.types.get(rotation)
    if types and spec.type_of(rotation) not in types:
        return f"{rotation} must be of type {' or '.join(types)} there", f"--type {rotation}={types[0]}"
    if plan is None or rotation in MERGEABLE:
        return None
    if rotation == "R4" and runtime.r4_bases:
        for space in plan.spaces_of("R4"):
            order = spec.block_of("R4") or space.size
            if order // (order & -order) not in runtime.r4_bases:
                return (
                    f"order {order} of {space.name} has no kernel there",
                    f"--block-size R4={space.size & -space.size}",
                )
    if not runtime.biased:
        names = {space.name for space in plan.spaces_of(rotation)}
        modules = [online.module for online in plan.onlines if online.site == "input" and online.space in names]
        biased = [module for module in modules if module in plan.biased]
        if biased:
            return f"{biased[0]} has a bias, which it refuses under a transform", "--runtime vllm-plugin"
    return None


def runtime_of(name: str) -> Runtime:
    """Look a runtime up by name. Raises SchemeError for an unknown one."""
    if name not in RUNTIMES:
        raise SchemeError(f"unknown runtime {name!r}: expected one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def format_for(name: str, scheme: Scheme, spec: "RotationSpec") -> str:
    """The folder format to write for a runtime. Raises SchemeError if spinquant writes none for it."""
    runtime = runtime_of(name)
    if runtime.format is None:
        raise SchemeError(f"spinquant writes no folder for {runtime.title}: {runtime.how}")
    plain = scheme_names(scheme) == ("none",) and all(rotation in MERGEABLE for rotation in spec.rotations)
    return "hf" if plain else runtime.format


def check_runtime(name: str, scheme: Scheme, spec: "RotationSpec", plan: Plan | None = None) -> None:
    """Raise RotationError or SchemeError, with an alternative, for what a runtime does not support.

    plan: adds the limits that depend on the model: orders, and biases of linears.
    """
    format_for(name, scheme, spec)
    for row in runtime_rows(name, spec, scheme, plan):
        if not row["runs"]:
            error = RotationError if row["what"] in ROTATION_NAMES else SchemeError
            raise error(f"{RUNTIMES[name].title} does not run {row['what']} ({row['why']}). Instead: {row['instead']}")
