"""The standard normal in 50 digits, for arguments taken as exact."""

import mpmath
from mpmath import mp, mpf

mp.dps = 50


def exact_log_ndtr(x: mpf) -> mpf:
    """log Phi(x)."""
    small = mpmath.erfc(abs(x) / mpmath.sqrt(2)) / 2
    return mpmath.log(small) if x < 0 else mpmath.log1p(-small)


def exact_log_prob(x: mpf) -> mpf:
    """log phi(x)."""
    return -x * x / 2 - mpmath.log(2 * mpmath.pi) / 2


def exact_ndtri_exp(log_p: mpf, guess: float) -> mpf:
    """Phi^-1(exp(log_p)) <= 0, by Newton's method from `guess`.

    log Phi of the result is log_p to 45 digits.
    """
    x = mpf(guess) if guess < 0 else mpf(-1)
    for _ in range(100):
        error = exact_log_ndtr(x) - log_p
        if abs(error) < mpf(10) ** -45 * (1 + abs(log_p)):
            return x

        x = min(
            x - error * mpmath.exp(exact_log_ndtr(x) - exact_log_prob(x)), mpf(0) if x else mpf(-1)
        )

    raise RuntimeError(f"No quantile of log p = {log_p}.")
