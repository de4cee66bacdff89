"""Walks through the blocks of a model on disk: moments and scores are those of the model in memory."""

from dataclasses import replace

import pytest
import torch

from families import FAMILIES, tiny
from models import CONFIGS, random_weights, tiny_model, tokens
from spinquant import ArchitectureError, RotationSpec, load, make_rotations, parse_scheme, plan_of
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.entrypoints.learn_blocks import opened_blocks
from spinquant.evaluation.tiny_model import exact_experts
from spinquant.learning.fake_quant import fuse_gains, learning_scheme
from spinquant.learning.free_transforms import closed_form_transforms, free_spaces
from spinquant.learning.moments import collect_moments, sites_of
from spinquant.learning.scoring import Candidate, Exact, Rounded, observed
from spinquant.learning.walk import check_walkable, walked_moments
from spinquant.learning.walk_scores import STATES, walked_scores

FOUR = parse_scheme("W4A4KV4", lm_head=True)


def spec_for(name):
    wanted = FAMILIES[name].allowed if name in FAMILIES else ("R1", "R2", "R3", "R4")
    return RotationSpec(wanted, "auto")


def saved(path, name):
    model = tiny_model(name) if name in CONFIGS else random_weights(tiny(name))
    model.save_pretrained(path)
    return path


def prepared(folder, spec, wanted=FOUR):
    """The model in memory with its gains fused, its plan, rotations, and the sites of all free transforms."""
    model = load(folder)
    exact_experts(model)
    plan = plan_of(model)
    rotations = make_rotations(plan, spec)
    fuse_gains(model, plan, rotations)
    scheme = learning_scheme(wanted, weights=True)
    spaces = [name for names in free_spaces(plan, rotations, scheme).values() for name in names]
    return model, plan, rotations, sites_of(plan, spaces, scheme, rotations)


def assert_equal_moments(found, expected):
    assert found.keys() == expected.keys() and found
    for space, folds in expected.items():
        for one, other in zip(found[space], folds, strict=True):
            assert len(one) == len(other), space
            for a, b in zip(one, other, strict=True):
                assert (a.length, a.noise) == (b.length, b.noise)
                for x, y in ((a.x, b.x), (a.g, b.g)):
                    assert torch.allclose(x, y, rtol=1e-4, atol=1e-6 * float(y.abs().max())), space


# Biases; a tied head; norms after the blocks, windows and norms of queries and keys; learned positions and (in, out)
# weights; experts; a recurrence.
WALKED = ("llama", "llama-tied", "gemma3", "gpt2", "qwen3_moe", "bamba")


@pytest.mark.parametrize(("name", "wanted"), [*((name, "W4A4KV4") for name in WALKED), ("gpt2", "W4A16")])
def test_moments_of_a_walk_equal_those_in_memory(name, wanted, tmp_path):
    folder, spec, ids, scheme = saved(tmp_path / "model", name), spec_for(name), tokens(3, 12), parse_scheme(wanted)
    model, plan, _, sites = prepared(folder, spec, scheme)
    how = {"share": 0.3}
    expected = collect_moments(model, plan, sites, scheme, ids, generator=torch.Generator().manual_seed(3), **how)
    with opened_blocks(folder, scheme, spec, device="cpu") as blocks:
        exact_experts(blocks.home.model)
        pieces = Pieces(tmp_path / "pieces")
        generator = torch.Generator().manual_seed(3)
        found = walked_moments(blocks.home, blocks.home.plan, sites, scheme, ids, pieces, generator=generator, **how)
        assert all(parameter.is_meta for parameter in blocks.home.model.parameters()), "a block stayed in memory"
    assert_equal_moments(found, expected)
    assert not list((tmp_path / "pieces").glob("walk-states*"))


@pytest.mark.parametrize("name", ("llama", "gemma3", "qwen3_moe"))
def test_scores_of_a_walk_equal_those_in_memory(name, tmp_path):
    """Candidates do not disturb each other."""
    folder, spec, ids = saved(tmp_path / "model", name), spec_for(name), tokens(2, 12)
    model, plan, rotations, sites = prepared(folder, spec)
    scheme = learning_scheme(FOUR, weights=True)
    moments = collect_moments(model, plan, sites, FOUR, ids, generator=torch.Generator().manual_seed(3))
    free = closed_form_transforms(plan, moments)
    assert free
    plain, other = Candidate(rotations, {}, 0.9, 0.95), make_rotations(plan, replace(spec, seed=7))
    candidates = {"plain": plain, "free": replace(plain, free=free), "other": Candidate(other)}
    judge = Rounded(model, plan, scheme, 0.2)
    exact = Exact(model, ids)
    expected = {key: observed(judge, candidate, exact).score() for key, candidate in candidates.items()}
    judge.close()
    with opened_blocks(folder, FOUR, spec, device="cpu") as blocks:
        exact_experts(blocks.home.model)
        found = walked_scores(blocks.home, blocks.home.plan, candidates, scheme, ids, share=0.2)
    assert list(found) == ["plain", "free", "other", "16-bit"]
    for key, score in expected.items():
        assert found[key].kl == pytest.approx(score.kl, rel=1e-4, abs=1e-12), key
        assert found[key].perplexity == pytest.approx(score.perplexity, rel=1e-5)


class Stop(Exception):
    pass


def stopping(after):
    def progress(done, total):
        if done == after:
            raise Stop

    return progress


@pytest.mark.parametrize("after", (1, 4, 6))
def test_an_interrupted_walk_goes_on_where_it_stopped(after, tmp_path):
    folder, spec, ids = saved(tmp_path / "model", "llama"), spec_for("llama"), tokens(2, 12)
    _, _, _, sites = prepared(folder, spec)
    with opened_blocks(folder, FOUR, spec, device="cpu") as blocks:
        home, read = blocks.home, []

        def walk(pieces, progress=None):
            generator = torch.Generator().manual_seed(3)
            return walked_moments(home, home.plan, sites, FOUR, ids, pieces, generator=generator, progress=progress)

        expected = walk(Pieces(tmp_path / "whole"))
        with pytest.raises(Stop):
            walk(Pieces(tmp_path / "pieces"), stopping(after))
        found = walk(Pieces(tmp_path / "pieces"), lambda done, total: read.append(done))
    assert read == list(range(after + 1, 8)), "what was finished is not computed again"
    for space, folds in expected.items():
        for one, other in zip(found[space], folds, strict=True):
            assert all(torch.equal(a.x, b.x) and torch.equal(a.g, b.g) for a, b in zip(one, other, strict=True))


def test_interrupted_scores_go_on_where_they_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("spinquant.learning.walk_scores.SAVED_EVERY", 0.0)
    folder, spec, ids, read = saved(tmp_path / "model", "llama"), spec_for("llama"), tokens(2, 12), []
    _, plan, rotations, _ = prepared(folder, spec)
    candidates, pieces = {"random": Candidate(rotations)}, Pieces(tmp_path / "pieces")
    scheme = learning_scheme(FOUR, weights=False)
    with opened_blocks(folder, FOUR, spec, device="cpu") as blocks:

        def walk(label, progress=None):
            how = {"pieces": pieces, "label": label, "progress": progress}
            return walked_scores(blocks.home, plan, candidates, scheme, ids, **how)

        expected = walked_scores(blocks.home, plan, candidates, scheme, ids, share=0.2)
        with pytest.raises(Stop):
            walk("one", stopping(2))
        assert pieces.about(STATES)["block"] == 2
        assert walk("one", lambda done, total: read.append(done)) == expected
        assert read == [3, 4]
        assert walk("another", lambda done, total: read.append(done)) == expected
        assert read == [3, 4, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ("zamba", "zamba2", "deepseek_v4"))
def test_families_whose_blocks_read_more_than_hidden_states_are_refused(name):
    with pytest.raises(ArchitectureError, match=f"(?i){name.replace('_', '')}.*(reads|pass more)"):
        check_walkable(FAMILIES[name].config())


def test_blocks_that_pass_something_past_the_hidden_states_are_refused(monkeypatch):
    """What a block leaves behind for the next one is lost when each runs alone; here everything that it does."""
    monkeypatch.setattr("spinquant.learning.walk.run_block", lambda block, states, arguments: states)
    with pytest.raises(ArchitectureError, match="pass more to each other"):
        check_walkable(CONFIGS["llama"]())
