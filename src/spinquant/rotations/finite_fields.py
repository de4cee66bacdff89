"""Quadratic characters of finite fields, from which Paley's Hadamard matrices are constructed.

The field of q = p^e elements is F_p[x] modulo a monic polynomial of degree e. If x generates all q - 1
nonzero elements, the polynomial is primitive, and the character that tells squares from non-squares is
chi(x^k) = (-1)^k. So one walk through the powers of x proves that the field is a field and fills the
table; prime fields are the case e = 1, where x stands for a primitive root.

An element is the integer whose digits in base p are its coefficients.
"""

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor


def factorize(number: int) -> dict[int, int]:
    """Exponents by prime, by trial division."""
    factors: dict[int, int] = {}
    divisor = 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            factors[divisor] = factors.get(divisor, 0) + 1
            number //= divisor
        divisor += 1 if divisor == 2 else 2
    if number > 1:
        factors[number] = factors.get(number, 0) + 1
    return factors


@lru_cache(maxsize=1024)
def is_prime_power(number: int) -> bool:
    """Whether a number is a power of one prime."""
    return len(factorize(number)) == 1


def _powers_of_x(p: int, reduction: tuple[int, ...]) -> list[int]:
    """The powers 1, x, x^2, ... until 1 recurs, where x^e = sum reduction[i] x^i."""
    unit = (1, *[0] * (len(reduction) - 1))
    element, powers = unit, []
    while True:
        powers.append(sum(digit * p**i for i, digit in enumerate(element)))
        carry = element[-1]
        element = tuple((low + carry * c) % p for low, c in zip((0, *element[:-1]), reduction, strict=True))
        if element == unit:
            return powers


def quadratic_character(q: int) -> Tensor:
    """Quadratic character of the field of q elements, q an odd prime power.

    Returns:
        int8, shape (q,): 0 at zero, 1 at squares, -1 elsewhere.
    """
    ((p, degree),) = factorize(q).items()
    for reduction in product(range(p), repeat=degree):
        if reduction[0] == 0:  # x would divide zero and its powers never return to 1
            continue
        powers = _powers_of_x(p, reduction)
        if len(powers) == q - 1:
            chi = torch.zeros(q, dtype=torch.int8)
            chi[powers[0::2]] = 1
            chi[powers[1::2]] = -1
            return chi
    raise AssertionError(f"no primitive polynomial over a field of {q} elements")


def jacobsthal(q: int) -> Tensor:
    """Jacobsthal matrix chi(a - b), int8, shape (q, q).

    Elements are ordered 0, then one of each pair {a, -a}, then their negatives, so for q = 1 mod 4 an element and its
    negative are (q - 1) / 2 apart.
    """
    ((p, degree),) = factorize(q).items()
    scale = p ** torch.arange(degree)
    digits = torch.arange(q)[:, None] // scale % p  # (q, e)
    negative = ((-digits % p) * scale).sum(-1)
    element = torch.arange(q)
    half = element[element < negative]
    digits = digits[torch.cat([element[:1], half, negative[half]])]
    difference = torch.zeros(q, q, dtype=torch.int64)
    for i in range(degree):
        difference += (digits[:, None, i] - digits[None, :, i]) % p * p**i
    return quadratic_character(q)[difference]
