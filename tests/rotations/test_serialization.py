"""Which matrices count as orthogonal when rotations are read."""

import pytest
import torch

from spinquant.errors import RotationError
from spinquant.rotations.rotation import ORTHOGONAL, Orthogonal, off_orthogonal
from spinquant.rotations.serialization import restore


@pytest.mark.parametrize("seed", range(3))
def test_matrices_computed_in_float32_are_read_and_rounded_ones_refused(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.linalg.qr(torch.randn(512, 512, generator=generator)).Q
    assert 3 * off_orthogonal(weight) < ORTHOGONAL  # with room for other processors
    found = restore(Orthogonal(weight).describe(), {"weight": weight})
    assert isinstance(found, Orthogonal) and torch.equal(found.weight, weight)
    for wrong in (weight.bfloat16(), weight * (1 + ORTHOGONAL), weight.clone().fill_(torch.nan)):
        with pytest.raises(RotationError, match="not orthogonal"):
            restore(Orthogonal(weight).describe(), {"weight": wrong})
