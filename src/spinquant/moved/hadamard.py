"""`from spinquant.hadamard import construct`, now in `spinquant.rotations.hadamard`."""

from spinquant.rotations.hadamard import construct, hadamard_matrix, hadamard_transform

__all__ = ["construct", "hadamard_matrix", "hadamard_transform"]
