"""SpinQuantModifier on a real model: apply, learn, and a custom transform config. Offline once the model is cached.

python examples/modifier.py
"""

import torch

import spinquant
from spinquant import SpinQuantModifier
from spinquant.demo.model import demo_model


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens, use_cache=False).logits.double()


def report(what, before, after):
    print(f"{what:<48} logits moved by {(after - before).square().mean():.1e} (mean square)")


def peakedness(weight):
    """Fourth moment over the squared second: 3 for a Gaussian; small values suit a 4-bit grid."""
    return (weight**4).mean() / (weight**2).mean() ** 2


def main():
    folder = demo_model()
    name, text = spinquant.load_text("manual")
    tokens = spinquant.token_windows(spinquant.load_tokenizer(folder), text, length=128, count=1)
    print(f"{folder.name}, tokens of {name}")

    # All four rotations. Equals spinquant.rotate with the same arguments.
    model = spinquant.load(folder)
    before = logits(model, tokens)
    SpinQuantModifier(rotations="R1,R2,R3,R4", transform_type="random-hadamard", seed=0).apply(model)
    report("R1-R4, random Hadamard", before, logits(model, tokens))

    # Learned: R2 is a parameter of the model while `train` runs, and fused afterwards.
    model = spinquant.load(folder)
    values = [layer.self_attn.v_proj for layer in model.model.layers]

    def train(model):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for step in range(6):
            loss = torch.stack([peakedness(value.weight) for value in values]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"  step {step}: peakedness of the value projections {loss.item():.4f}")

    SpinQuantModifier(rotations="R2", learnable=True, precision="float32").apply(model, train)
    report("R2, learned", before, logits(model, tokens))

    # A custom transform config: rotate the input of every output projection at run time, in blocks of 64.
    model = spinquant.load(folder)
    place = {"targets": ["re:.*o_proj$"]}
    online = [{**place, "location": "input"}, {**place, "location": "weight_input", "inverse": True}]
    config = {"config_groups": {"mine": {"type": "hadamard", "head_dim": 64, "apply": online}}}
    SpinQuantModifier(transform_config=config).apply(model)
    report("o_proj rotated at run time", before, logits(model, tokens))


if __name__ == "__main__":
    main()
