"""The dtype of arithmetic: what the processor multiplies fast and memory allows, unless the user says otherwise."""

import logging
import platform

import pytest
import torch

from spinquant.compute.dtypes import HALVES, _measured_fast, arithmetic, multiplies_fast

X86 = platform.machine().lower() in ("x86_64", "amd64")
HUGE = 10**15  # weights that no machine has the memory for


@pytest.fixture
def processor(monkeypatch):
    """A function that makes torch report a processor with some features."""

    def fake(*features: str) -> None:
        names = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_tile": "_is_amx_tile_supported"}
        names |= {"amx_fp16": "_is_amx_fp16_supported"}
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        for feature, name in names.items():
            monkeypatch.setattr(torch.cpu, name, lambda feature=feature: feature in features)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True), raising=False)

    return fake


@pytest.mark.skipif(not X86, reason="features of x86 processors")
@pytest.mark.parametrize(
    ("features", "fast"),
    [
        ((), ()),
        (("avx512_bf16",), (torch.bfloat16,)),
        (("amx_tile",), (torch.bfloat16,)),
        (("avx512_bf16", "avx512_fp16"), HALVES),
        (("amx_tile", "amx_fp16"), HALVES),
    ],
)
def test_the_features_of_a_processor_decide(processor, features, fast):
    processor(*features)
    for half in HALVES:
        assert multiplies_fast(half) == (half in fast)
        assert arithmetic("it", half, 10, "cpu").dtype == (half if half in fast else torch.float32)


@pytest.mark.skipif(not X86, reason="features of x86 processors")
@pytest.mark.parametrize(
    ("limit", "fast"),
    [("AVX2", ()), ("avx512_core_vnni", ()), ("AVX512_CORE_BF16", (torch.bfloat16,)), ("ALL", HALVES)],
)
def test_the_limit_of_onednn_counts_as_the_processor(processor, monkeypatch, limit, fast):
    processor("avx512_bf16", "avx512_fp16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert tuple(half for half in HALVES if multiplies_fast(half)) == fast


@pytest.mark.parametrize("half", HALVES)
def test_the_user_memory_and_an_accelerator_override_it(monkeypatch, half):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert arithmetic("it", half, 10, "cpu", wanted=half).dtype == half
    assert arithmetic("it", half, HUGE, "cpu", wanted=torch.float32).dtype == torch.float32
    assert arithmetic("it", half, 10, "cuda:1").dtype == half
    scarce = arithmetic("it", half, HUGE, "cpu")
    assert scarce.dtype == half and "float32 would take 4000000.0 GB of" in scarce.reason
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(HUGE))  # processes that share the memory
    assert arithmetic("it", half, 10, "cpu").dtype == half


@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_wide_dtypes_are_kept(monkeypatch, stored):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert arithmetic("it", stored, HUGE, "cpu").dtype == stored


def test_a_choice_that_a_user_would_not_expect_is_logged(monkeypatch, caplog):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with caplog.at_level(logging.INFO, logger="spinquant"):
        arithmetic("model", torch.float32, 10, "cpu")
        arithmetic("model", torch.bfloat16, 10, "cpu", wanted=torch.bfloat16)
        assert not caplog.messages
        arithmetic("model", torch.bfloat16, 10, "cpu")
        arithmetic("model", torch.bfloat16, HUGE, "cpu")
    wide, narrow = caplog.messages
    assert wide.startswith("model: computing in float32") and wide.endswith("--dtype bfloat16 overrides")
    assert narrow.startswith("model: computing in bfloat16") and narrow.endswith("--dtype float32 overrides")


def test_other_processors_are_timed():
    assert _measured_fast(torch.float32)  # takes as long as itself
    assert not _measured_fast(torch.float64) or not X86
