"""Numbers of the sampling contract that all three implementations share; initperf/rng/contract.py says how they are used.

Polynomials are minimax fits with float32 coefficients, lowest power first; scripts/fit_polynomials.py derives them.
"""

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Salmon et al. 2011
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
TILE = 1024  # values of a tile: lane j of block i is value 256 j + i
BLOCKS = 256  # Philox blocks of a tile

# Kinds of distribution: which formula a kernel applies to the words.
BITS, UNIFORM, NORMAL, TRUNC_NORMAL, TRUNC_CENTER, TRUNC_TAIL, TRUNC_FAR, TRUNC_NARROW = range(8)

# -2 ln(x 2^-k), x = 2^e m, is LOG_SLOPE * (bits(x) - bits(2^k)) + (m - 1)(2 - m) LOG(m - 1.5): linear between powers of
# two, and a correction that vanishes at each of them. Relative error 2.5e-8, before rounding.
LOG_SLOPE = -1.6525916635146132e-07  # -2 ln(2) 2^-23
LOG = (
    -0.4711321294307709,
    0.21184507012367249,
    -0.10675500333309174,
    0.05721025541424751,
    -0.03178948536515236,
    0.018716631457209587,
    -0.01218627579510212,
    0.005770987365394831,
)

# sin(pi x) = x SIN(x^2), cos(pi x) = COS(x^2) for |x| <= 1/2: absolute errors 7.6e-9 and 5.5e-8.
SIN = (3.141592502593994, -5.1677021980285645, 2.549957752227783, -0.5976253151893616, 0.07643340528011322)
COS = (1.0, -4.934795379638672, 4.058447360992432, -1.3320623636245728, 0.22000686824321747)

# Quantile z of the normal: z = y CENTER(-2 ln(1 - y^2)), y = 2p - 1, for |z| <= 2.25. Absolute error 2.5e-8.
CENTER = (
    1.2533138990402222,
    0.16406045854091644,
    0.0040784175507724285,
    -0.00040755883674137294,
    -1.4244032172427978e-05,
    2.969305342048756e-06,
    -1.0847213616216322e-07,
)
# The same from the upper tail mass q: with t = sqrt(-2 ln q), z = NEAR(t - 2) for q <= 1/2, t < 2.8; MIDDLE(t - 5) up to
# t = 7.25; DISTANT(t - 12) up to t = 17.5. Error at most 1.3e-7 max(z, 1).
NEAR = (
    1.1015195846557617,
    1.2445298433303833,
    -0.08034523576498032,
    0.02875150926411152,
    -0.010909332893788815,
    0.004164754878729582,
    -0.0015949048101902008,
    0.000977567513473332,
    -0.0005037444061599672,
)
MIDDLE = (
    4.480314254760742,
    1.0671439170837402,
    -0.010059253312647343,
    0.001602250151336193,
    -0.00026554823853075504,
    4.21224940510001e-05,
    -6.486555776064051e-06,
    1.8595607116367319e-06,
    -3.9573001231474336e-07,
)
DISTANT = (
    11.714357376098633,
    1.0170764923095703,
    -0.001153305172920227,
    8.183404861483723e-05,
    -5.963688181509497e-06,
    4.215864919387968e-07,
    -3.1526134591786104e-08,
    3.4762788203579476e-09,
    -2.550433475523306e-10,
)
# (border between two pieces, centre and polynomial below it, centre and polynomial above it)
PIECES: dict[int, tuple[float, float, tuple[float, ...], float, tuple[float, ...]]] = {
    TRUNC_NORMAL: (2.8125, 2.0, NEAR, 5.0, MIDDLE),
    TRUNC_TAIL: (7.25, 5.0, MIDDLE, 12.0, DISTANT),
}
