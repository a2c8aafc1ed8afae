"""Derives the polynomials of kernels/contract.py: minimax fits by Lawson's iteration, coefficients rounded to float32 one by one."""

import numpy as np
from scipy.special import erf, erfinv, ndtri_exp

NODES = np.cos(np.pi * (np.arange(400) + 0.5) / 400)


def minimax(x, y, weight, powers, rounds=200):
    """(largest weighted error, coefficients) of the sum of c x^p nearest to y."""
    basis = np.stack([x**p for p in powers], 1) * weight[:, None]
    scale = np.abs(basis).max(0)
    basis, target = basis / scale, y * weight
    lawson = np.full(len(x), 1 / len(x))
    best = (np.inf, None)
    for _ in range(rounds):
        root = np.sqrt(lawson)
        c = np.linalg.lstsq(basis * root[:, None], target * root, rcond=None)[0]
        error = np.abs(basis @ c - target)
        best = min(best, (error.max(), tuple(c / scale)))
        lawson *= error + 1e-30
        lawson /= lawson.sum()
    return best


def show(name, x, y, weight, powers):
    """Round the lowest power that is left to float32, fit the others again, and so on."""
    rest, coefficients = y.copy(), []
    for k in range(len(powers)):
        c = float(np.float32(minimax(x, rest, weight, powers[k:])[1][0]))
        coefficients.append(c)
        rest -= c * x ** powers[k]
    print(f"{name} = {tuple(coefficients)}  # weighted error {np.abs(rest * weight).max():.3g}")


t = NODES / 2
m = t + 1.5
gap = (m - 1) * (2 - m)
exact = np.longdouble(m)
excess = np.log(exact) - np.log(np.longdouble(2)) * (exact - 1)  # over the line between powers of two
show("LOG", t, (-2 * excess / gap).astype(float), gap / (-2 * np.log(m / 2)), range(8))

square = (NODES + 1) / 8
x = np.sqrt(square)
show("SIN", square, np.sin(np.pi * x) / x, x, range(5))
show("COS - 1", square, np.cos(np.pi * x) - 1, np.ones_like(x), range(1, 5))

s = (NODES + 1) / 2 * -2 * np.log(1 - erf(2.26 / np.sqrt(2)) ** 2)
y = np.sqrt(-np.expm1(-s / 2))
show("CENTER", s, np.sqrt(2) * erfinv(y) / y, y, range(7))

for name, low, high, center in (("NEAR", 1.177, 2.8125, 2.0), ("MIDDLE", 2.8, 7.25, 5.0), ("DISTANT", 7.2, 17.5, 12.0)):
    t = (low + high) / 2 + NODES * (high - low) / 2
    z = -ndtri_exp(-t * t / 2)
    show(name, t - center, z, 1 / np.maximum(z, 1), range(9))
