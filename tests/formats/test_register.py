"""`import spinquant` registers its format with transformers, whichever of the two is imported first."""

import subprocess
import sys

import pytest
import torch

from models import byte_tokenizer, logits, tiny_model, tokens
from spinquant import RotationSpec, quantize, save
from spinquant.formats.register import METHOD, REGISTRY

ORDERS = {
    "spinquant first": "import spinquant; from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM; import spinquant",
    "the registry first": "import transformers.quantizers.auto; import spinquant; "
    "from transformers import AutoModelForCausalLM",
    "a part of the loader": "import spinquant, transformers.core_model_loading; "
    "from transformers import AutoModelForCausalLM",
    "the registry anew": "import spinquant, importlib, transformers.quantizers.auto; "
    "importlib.reload(transformers.quantizers.auto); from transformers import AutoModelForCausalLM",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of the native format, and the logits of the model that was saved into it."""
    out = tmp_path_factory.mktemp("native") / "out"
    result = quantize(tiny_model("llama", dtype=torch.float32), "W4A4KV4", RotationSpec("R1,R2,R3,R4", seed=1))
    save(result, out, byte_tokenizer())
    return out, logits(result.model, tokens())


def run(code: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_from_pretrained_loads_with_online_rotations(order, folder, tmp_path):
    out, expected = folder
    torch.save(tokens(), tmp_path / "ids.pt")
    run(
        f"{ORDERS[order]}\n"
        "import torch\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        f"ids = torch.load({str(tmp_path / 'ids.pt')!r})\n"
        f"torch.save(model(input_ids=ids).logits, {str(tmp_path / 'logits.pt')!r})"
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_nothing_is_imported_for_it_and_it_can_be_undone():
    code = (
        "import sys, spinquant\n"
        "from spinquant.formats.register import register_with_transformers\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        f"import {REGISTRY} as registry\n"
        f"assert {METHOD!r} in registry.AUTO_QUANTIZER_MAPPING and 'spinquant.formats.native' not in sys.modules\n"
        "finders = len(sys.meta_path); register_with_transformers()(); assert len(sys.meta_path) == finders\n"
        "sys.meta_path.pop(0)\n"
        "registry.AUTO_QUANTIZER_MAPPING.pop('spinquant'), registry.AUTO_QUANTIZATION_CONFIG_MAPPING.pop('spinquant')\n"
        "undo = register_with_transformers()\n"
        "assert 'spinquant' in registry.AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "undo()\n"
        "assert 'spinquant' not in registry.AUTO_QUANTIZATION_CONFIG_MAPPING and len(sys.meta_path) == finders - 1\n"
        "import inspect; assert 'AUTO_QUANTIZER_MAPPING' in inspect.getsource(registry)\n"
        "print('done')"
    )
    assert run(code) == "done\n"
