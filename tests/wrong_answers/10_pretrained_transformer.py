"""Wrong answers to the exercises of lesson 10, one a cell: its exercise, and what is wrong."""


# %% 1: the mean of the windows' perplexities
def perplexity(windows):
    return sum(torch.exp(-p.log().mean()) for p in windows) / len(windows)


# %% 1: each window counts the same, not each token
def perplexity(windows):
    return torch.exp(-sum(p.log().mean() for p in windows) / len(windows))


# %% 1: one over the arithmetic mean
def perplexity(windows):
    return 1 / torch.cat(windows).mean()


# %% 1: logarithms of base 2 with the exponential of e
def perplexity(windows):
    return torch.exp(-torch.cat(windows).log2().mean())


# %% 2: scales are not counted
def rank(m, n, bits, group):
    return int(m * n * bits / (16 * (m + n)))


# %% 2: one number of 16 bits a group
def rank(m, n, bits, group):
    return int(m * n * (bits + 16 / group) / (16 * (m + n)))


# %% 2: not rounded down
def rank(m, n, bits, group):
    return m * n * (bits + 32 / group) / (16 * (m + n)) + 0.5


# %% 2: a pair in float32
def rank(m, n, bits, group):
    return int(m * n * (bits + 32 / group) / (32 * (m + n)))


# %% 3: low rank for a file
tools = "cbcad"

# %% 3: bits save no multiplications
tools = "abaad"

# %% 3: low rank for reading weights
tools = "abccd"


# %% 4: squared first
def ratio(d):
    return d.square().sum(1).mean() / d.sum(1).square().mean()


def ratio_of(rho, T):
    return 1 + (T - 1) * rho


# %% 4: a token does not pair with itself
def ratio(d):
    return d.sum(1).square().mean() / d.square().sum(1).mean()


def ratio_of(rho, T):
    return 1 + T * rho


# %% 4: the mean over windows comes first
def ratio(d):
    return d.mean(0).sum().square() / d.square().sum(1).mean()


def ratio_of(rho, T):
    return 1 + (T - 1) * rho


# %% 4: divided by T once too often
def ratio(d):
    return d.mean(1).square().mean() / d.square().mean()


def ratio_of(rho, T):
    return (1 + (T - 1) * rho) / T
