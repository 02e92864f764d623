"""`normal.py` for Triton kernels: the standard normal in log space, and the Newton step, in float32.

Only exp, log and polynomials. Triton's own special functions come from a library of the GPU's
maker, which its interpreter does not have.
"""

try:  # everything that needs triton is in here: a checkpoint must load without it
    import triton
    import triton.language as tl

    @triton.jit
    def exact_exp(x):
        """exp(x) to 2 units in the last place, however large x is.

        `tl.exp` on a GPU is 2^(x log2(e)) with that product rounded: at x = -20 it has lost 4 bits.
        Here the integer part of the product is split off first. This is for factors that are used
        as they are. In a sum of exponentials whose largest is 1, `tl.exp` is as good.
        """
        x = tl.minimum(tl.maximum(x, -104.0), 89.0)
        n = tl.floor(x * 1.4426950408889634 + 0.5)

        # log(2) in two parts, of which the first makes an exact product.
        rest = (x - n * 0.693145751953125) - n * 1.428606765330187e-06

        return tl.exp(rest) * tl.exp2(n)

    @triton.jit
    def log1p(x):
        # Kahan's, exact for small x, too: log(u) x / (u - 1), with u = 1 + x as rounded.
        u = 1.0 + x
        return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))

    @triton.jit
    def log_half_erfcx(a):
        """log(erfcx(a) / 2), a >= 0, to 2 units in the last place of erfcx.

        (1 + 2 a) erfcx(a) is smooth in t = (a - 2) / (a + 2), which maps [0, inf) to [-1, 1). It is
        a Chebyshev fit of degree 12, written as a polynomial, after Shepherd & Laframboise,
        Mathematics of Computation 36, 1981.
        """
        t = (a - 2.0) / (a + 2.0)
        p = -2.025598951149732e-05 * t + 6.336945807561278e-05
        p = p * t + 0.00022157155035529286
        p = p * t - 0.0003579204494599253
        p = p * t - 0.001464070868678391
        p = p * t + 0.0012174105504527688
        p = p * t + 0.008724607527256012
        p = p * t - 0.008018963038921356
        p = p * t - 0.05422026664018631
        p = p * t + 0.16404946148395538
        p = p * t - 0.1660303771495819
        p = p * t - 0.0927637591958046
        p = p * t + 1.2769783735275269

        return tl.log(0.5 * p / (1.0 + 2.0 * a))

    @triton.jit
    def normal_tails(x):
        """log Phi(x), log Phi(-x), log h(x) and log h(-x), as `normal_tails` of `normal.py`."""
        log_sqrt_2pi = 0.9189385332046727
        half_square = 0.5 * x * x
        log_factor = log_half_erfcx(tl.abs(x) * 0.7071067811865476)
        small = log_factor - half_square
        large = log1p(-tl.exp(small))
        small_hazard = -log_sqrt_2pi - log_factor
        large_hazard = -log_sqrt_2pi - half_square - large
        is_negative = x < 0.0

        return (
            tl.where(is_negative, small, large),
            tl.where(is_negative, large, small),
            tl.where(is_negative, small_hazard, large_hazard),
            tl.where(is_negative, large_hazard, small_hazard),
        )

    @triton.jit
    def lower_quantile(log_p):
        """Phi^-1(exp(log_p)) for log_p at most log(1/2), as `ndtri_exp` of `normal.py`."""
        w = -2.0 * log_p
        x = -tl.sqrt(tl.maximum(w - tl.log(w) - 1.8378770664093453, 0.0))

        for _ in tl.static_range(4):
            log_cdf, _log_sf, hazard, _sf_hazard = normal_tails(x)
            x = x - (log_cdf - log_p) * exact_exp(-hazard)

        return x

    @triton.jit
    def newton_step(x, value, log_slope, lower, upper, last_step, tolerance):
        """One round of `find_root` of `normal.py`, whose comments say why each step is as it is.

        Returns the next x, its bracket, the length of the step, and whether x itself is the root:
        the caller then keeps x.
        """
        lower = tl.where(value <= 0.0, x, lower)
        upper = tl.where(value >= 0.0, x, upper)
        spacing = 1.1920928955078125e-07 * tl.abs(x)
        is_root = (tl.abs(value) <= tolerance) | (upper - lower <= spacing)

        step = -value * exact_exp(-log_slope)
        crossing = tl.where(value > 0.0, -spacing, spacing)
        newton = x + tl.where(tl.abs(step) < spacing, crossing, step)

        is_good = (newton >= lower) & (newton <= upper) & (2.0 * tl.abs(step) <= last_step)
        new_x = tl.where(is_good, newton, lower + 0.5 * (upper - lower))
        last_step = tl.where(is_good, tl.abs(step), upper - lower)

        return new_x, lower, upper, last_step, is_root

except ImportError:
    triton = exact_exp = log1p = log_half_erfcx = lower_quantile = newton_step = None
    normal_tails = None

# With TRITON_INTERPRET=1, set before this file is imported, the kernels run in Triton's interpreter
# and need no GPU.
IS_INTERPRETED = type(normal_tails).__name__ == "InterpretedFunction"
