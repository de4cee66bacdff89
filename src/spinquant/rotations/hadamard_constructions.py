"""Constructions of base Hadamard matrices: Sylvester, Paley I and II, four circulants (Goethals-Seidel), Miyamoto.

Every function returns an int8 matrix H with entries +-1 and H H^T = n I. Where the construction allows it
(Paley II, symmetric circulants) rows and columns are ordered so that H commutes with the exchange of its
first two runs of (n - 4) / 2 indices; `fast_transform.py` then multiplies at half the cost.

Sources: Paley 1933; Williamson 1944; Goethals and Seidel 1967; Turyn 1974; Miyamoto 1991.
"""

import torch
from torch import Tensor

from spinquant.rotations.finite_fields import jacobsthal

# Order n -> generator of a group of multipliers and four sequences of period n, one sign for every orbit of
# the group on the integers mod n (orbits by their least element, 0 first). Their power spectra sum to 4n
# at every frequency. Found by matching autocorrelations of pairs; every matrix is checked by a test.
_SEQUENCES: dict[int, tuple[int, str]] = {
    23: (22, "++-++++---++ +-+-+--++-++ ---++-++++-+ +++-++---+-+"),
    39: (29, "+---++++++ -+--++-+++ +++-+----+ --+++---++"),
    43: (42, "++--++++--+--+-+-+++++ +++++-+--+--++---++--- +-+-+---++++-+----+-+- +++---+--++---+-++--+-"),
    65: (9, "+++-+--+--+-+-+ ++++-----++-++- +-+++++--+----+ +++++----+-+--+"),
    67: (29, "-++-+---+--++++-++-+-++ +-+++++--+--++-+----+++ ++++-++++++--++-----+-- ++-+-+----+-++++--+++-+"),
    93: (2, "-+-+---+-+++++ +-+-+++---+-++ ----++++++-++- --+++----++-++"),
    119: (2, "---+++-++ -+++---++ ---++++-+ ++-+-+--+"),
}

# Order 3n - 1 -> sequences X, Y, Z of length n and W of length n - 1 whose aperiodic autocorrelations
# satisfy N_X + N_Y + 2 N_Z + 2 N_W = 0 at every nonzero shift.
_TURYN: dict[int, str] = {
    47: "--++-++-+++--+++ +-+++--++++-+--- +++-+---++++-+++ ++-++-++-+-+---",
    59: "+++++-+-+++--+--+-+- ++--++--+-++++-++--- -+++-+++-+--+-++---- +++++---++-+-+++-++",
}

FOUR_CIRCULANTS = frozenset(_SEQUENCES) | frozenset(_TURYN)


def sylvester(order: int) -> Tensor:
    """Sylvester's matrix: the Kronecker power of [[1, 1], [1, -1]]; `order` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def paley_one(order: int) -> Tensor:
    """Paley I: I + S for the skew conference matrix S of a field of order - 1 = 3 mod 4 elements."""
    matrix = torch.ones(order, order, dtype=torch.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = jacobsthal(order - 1)
    return matrix + torch.eye(order, dtype=torch.int8) * (1 - matrix.diagonal())


def paley_two(order: int) -> Tensor:
    """Paley II: S x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]], S the symmetric conference matrix of order / 2."""
    q = order // 2 - 1
    conference = torch.ones(q + 1, q + 1, dtype=torch.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = jacobsthal(q)
    pairs = [[1, 1], [1, -1]], [[1, -1], [-1, -1]]
    kron, identity = (torch.tensor(pair, dtype=torch.int8) for pair in pairs)
    matrix = torch.kron(conference, kron) + torch.kron(torch.eye(q + 1, dtype=torch.int8), identity)
    return matrix.roll((-4, -4), (0, 1))  # infinity and 0, which negation fixes, go last


def miyamoto(order: int, hadamard: Tensor) -> Tensor:
    """Miyamoto: a matrix of order 4q from one of order q - 1, for a field of q = 1 mod 4 elements.

    P is the Paley core of the field without its first row and column, squares first; its rows have products
    q I - 2 J on squares and on non-squares. U = I x P and V = [[I, K], [-K^T, I]] have disjoint supports
    that cover everything, so [[U + V, U - V], [U - V, U + V]] has entries +-1 and is orthogonal but for
    the four blocks of J, which a border of four rows and columns cancels.
    """
    q = order // 4
    core = jacobsthal(q)
    squares_first = torch.cat([(core[0] == 1).nonzero(), (core[0] == -1).nonzero()]).flatten()
    core = core[squares_first][:, squares_first]
    identity = torch.eye(q - 1, dtype=torch.int8)
    u = torch.kron(torch.eye(2, dtype=torch.int8), core)
    v = torch.cat([torch.cat([identity, hadamard], 1), torch.cat([-hadamard.T, identity], 1)])
    inner = torch.cat([torch.cat([u + v, u - v], 1), torch.cat([u - v, u + v], 1)])

    corner = 1 - 2 * torch.eye(4, dtype=torch.int8)  # the regular Hadamard matrix of order 4
    left = sylvester(4)
    top = -(corner @ left) // 2 * torch.tensor([-1, 1, -1, 1], dtype=torch.int8)  # row sums of P are -1, then +1
    group = torch.arange(4).repeat_interleave((q - 1) // 2).repeat(2)  # the four blocks, in both halves
    return torch.cat([torch.cat([corner, top[:, group]], 1), torch.cat([left.T[group], inner], 1)])


def four_circulants(order: int) -> Tensor:
    """Goethals-Seidel array of four circulants of order / 4; Williamson's array if all of them are symmetric."""
    n = order // 4
    rows = _turyn_rows(n) if n in _TURYN else _orbit_rows(n)
    i = torch.arange(n)[:, None]
    j = torch.arange(n)[None, :]
    a = rows[0][(j - i) % n]
    b, c, d = (row[(-i - j) % n] for row in rows[1:])  # B R, where R maps i to -i
    bt, ct, dt = (row[(i + j) % n] for row in rows[1:])  # B^T R
    blocks = [[a, b, c, d], [-b, a, dt, -ct], [-c, -dt, a, bt], [-d, ct, -bt, a]]
    matrix = torch.cat([torch.cat(row, 1) for row in blocks])
    half = torch.arange(1, n // 2 + 1)
    block = n * torch.arange(4)[:, None]
    permutation = torch.cat([(block + half).flatten(), (block + n - half).flatten(), block.flatten()])
    return matrix[permutation][:, permutation]


def _signs(text: str) -> Tensor:
    return torch.tensor([1 if sign == "+" else -1 for sign in text], dtype=torch.int8)


def _orbit_rows(n: int) -> list[Tensor]:
    generator, sequences = _SEQUENCES[n]
    orbit_of = [-1] * n
    count = 0
    for start in range(n):
        if orbit_of[start] < 0:
            element = start
            while orbit_of[element] < 0:
                orbit_of[element] = count
                element = element * generator % n
            count += 1
    return [_signs(sequence)[orbit_of] for sequence in sequences.split()]


def _turyn_rows(n: int) -> list[Tensor]:
    """Turyn type sequences -> T-sequences (Z, 0), (0, W), (0, (X + Y) / 2), (0, (X - Y) / 2) -> four rows."""
    x, y, z, w = (_signs(sequence) for sequence in _TURYN[n].split())
    t = torch.zeros(4, n, dtype=torch.int8)
    m, tail = len(z), len(z) + len(w)
    t[0, :m], t[1, m:tail] = z, w
    t[2, tail:], t[3, tail:] = (x + y) // 2, (x - y) // 2
    return list(sylvester(4) @ t)
