"""Fast Walsh-Hadamard transform on the CPU, compiled by numba: log2(n) additions per number instead of n.

A Sylvester factor of order n = 2^k takes k stages of butterflies (sums and differences of two numbers); two stages are
done at once. For the last axis (`rows`), stages have constant geometry: neighbours are added and subtracted, sums go to
the first half and differences to the second, which brings every index bit to the lowest place in turn. For any other
axis (`columns`), each butterfly acts on all elements after the axis.

numba is the optional extra `fast`. Kernels are compiled for float32 and float64 and kept in numba's cache. Only
`fast_transform.py` calls them.
"""

from collections.abc import Callable
from typing import Any

import numba


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile a function without the GIL; cached on disk if numba finds a writable folder."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba finds no folder that it can write to
        return numba.njit(nogil=True)(function)


@_compiled
def _two(a, b, scale):
    half = len(b) // 2
    for j in range(half):
        u, v = a[2 * j] * scale, a[2 * j + 1] * scale
        b[j] = u + v
        b[half + j] = u - v


@_compiled
def _four(a, b, scale):
    quarter = len(b) // 4
    for j in range(quarter):
        u, v, w, x = a[4 * j], a[4 * j + 1], a[4 * j + 2], a[4 * j + 3]
        s, d, t, e = u + v, u - v, w + x, w - x
        b[j] = (s + t) * scale
        b[quarter + j] = (d + e) * scale
        b[2 * quarter + j] = (s - t) * scale
        b[3 * quarter + j] = (d - e) * scale


@_compiled
def _four_more(a, b):
    quarter = len(b) // 4
    for j in range(quarter):
        u, v, w, x = a[4 * j], a[4 * j + 1], a[4 * j + 2], a[4 * j + 3]
        s, d, t, e = u + v, u - v, w + x, w - x
        b[j] = s + t
        b[quarter + j] = d + e
        b[2 * quarter + j] = s - t
        b[3 * quarter + j] = d - e


@_compiled
def rows(x, out, order, scale, one, other):
    """out = x H scale for rows of `order` numbers. x and out are flat; `one` and `other` are buffers of one row."""
    stages = 0
    while (1 << stages) < order:
        stages += 1
    for start in range(0, len(x), order):
        source, target = x[start : start + order], out[start : start + order]
        current, spare = one, other
        if stages % 2:
            left = stages - 1
            _two(source, current if left else target, scale)
        else:
            left = stages - 2
            _four(source, current if left else target, scale)
        while left > 2:
            _four_more(current, spare)
            current, spare = spare, current
            left -= 2
        if left:
            _four_more(current, target)


@_compiled
def _two_columns(p, q, a, b, scale):
    for j in range(len(a)):
        u, v = p[j] * scale, q[j] * scale
        a[j] = u + v
        b[j] = u - v


@_compiled
def _four_columns(p, q, r, s, a, b, c, d, scale):
    for j in range(len(a)):
        u, v, w, x = p[j], q[j], r[j], s[j]
        e, f, g, h = u + v, u - v, w + x, w - x
        a[j] = (e + g) * scale
        b[j] = (f + h) * scale
        c[j] = (e - g) * scale
        d[j] = (f - h) * scale


@_compiled
def _four_in_place(a, b, c, d):
    for j in range(len(a)):
        u, v, w, x = a[j], b[j], c[j], d[j]
        e, f, g, h = u + v, u - v, w + x, w - x
        a[j] = e + g
        b[j] = f + h
        c[j] = e - g
        d[j] = f - h


@_compiled
def columns(x, out, scale):
    """out = H x scale along the middle axis of (batch, order, width)."""
    order = x.shape[1]
    stages = 0
    while (1 << stages) < order:
        stages += 1
    for k in range(x.shape[0]):
        a, b = x[k], out[k]
        if stages % 2:
            for i in range(0, order, 2):
                _two_columns(a[i], a[i + 1], b[i], b[i + 1], scale)
            done = 2
        else:
            for i in range(0, order, 4):
                _four_columns(a[i], a[i + 1], a[i + 2], a[i + 3], b[i], b[i + 1], b[i + 2], b[i + 3], scale)
            done = 4
        while done < order:
            for first in range(0, order, 4 * done):
                for i in range(first, first + done):
                    _four_in_place(b[i], b[i + done], b[i + 2 * done], b[i + 3 * done])
            done *= 4
