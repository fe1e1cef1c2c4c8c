"""Wrong answers to the exercises of lesson 10, one a cell: its exercise, and what is wrong."""


# %% 1: no scales
def megabytes(kept, bits):
    return (4 * kept * 10_616_832 + 30_522 * 384 * bits / 8 + 4 * 228_096) / 1e6


# %% 1: bits are not bytes
def megabytes(kept, bits):
    return (4 * kept * 10_616_832 + 30_522 * 384 * bits + 4 * 30_522 + 4 * 228_096) / 1e6


# %% 1: everything else is forgotten
def megabytes(kept, bits):
    return (4 * kept * 10_616_832 + 30_522 * 384 * bits / 8 + 4 * 30_522) / 1e6


# %% 2: ties do not count against the right entry
def mrr(scores):
    places = (scores > scores.diagonal()[:, None]).sum(1) + 1
    return (1 / places).mean()


# %% 2: one over the mean
def mrr(scores):
    places = (scores >= scores.diagonal()[:, None]).sum(1)
    return 1 / places.double().mean()


# %% 2: by columns: entries that look for queries
def mrr(scores):
    places = (scores >= scores.diagonal()[None]).sum(0)
    return (1 / places).mean()


# %% 3: padding counts
def covariance(x, mask):
    rows = x.flatten(0, 1)
    rows = rows - rows.mean(0)
    return rows.T @ rows / len(rows)


# %% 3: padding counts, as zeros
def covariance(x, mask):
    rows = (x * mask[..., None]).flatten(0, 1)
    rows = rows - rows.mean(0)
    return rows.T @ rows / len(rows)


# %% 3: not centered
def covariance(x, mask):
    rows = x[mask.bool()]
    return rows.T @ rows / len(rows)


# %% 4: as if tokens were independent
def change(s, rho, T):
    return s / T


# %% 4: a token does not pair with itself
def change(s, rho, T):
    return s * (1 + T * rho) / T


# %% 4: divided by T once too often
def change(s, rho, T):
    return s * (1 + (T - 1) * rho) / T**2
