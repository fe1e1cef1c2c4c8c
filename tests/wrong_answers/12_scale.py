"""Wrong answers to the exercises of lesson 12, one a cell: its exercise, and what is wrong."""

# %% 1: the gradients are those of the dense model, whatever the ranks
again = "b"
share = 2985 * (4096 + 11008) / (4096 * 11008)

# %% 1: nothing is decomposed again
again = "c"
share = 2985 * (4096 + 11008) / (4096 * 11008)

# %% 1: one factor only
again = "d"
share = 2985 * 4096 / (4096 * 11008)

# %% 1: factors of full rank
again = "d"
share = 4096 * (4096 + 11008) / (4096 * 11008)


# %% 2: all layers of the block
def peak(sizes):
    return 8 * sum(m * m + n * n for m, n in sizes)


# %% 2: float32
def peak(sizes):
    return 4 * max(m * m + n * n for m, n in sizes)


# %% 2: C alone
def peak(sizes):
    return 8 * max(n * n for m, n in sizes)


# %% 2: the largest weight
def peak(sizes):
    return 8 * max(m * n for m, n in sizes)


# %% 3: plain means of the means and the covariances
def merge(a, b):
    (count_a, mean_a, C_a), (count_b, mean_b, C_b) = a, b
    return count_a + count_b, (mean_a + mean_b) / 2, (C_a + C_b) / 2


# %% 3: nothing between the parts
def merge(a, b):
    (count_a, mean_a, C_a), (count_b, mean_b, C_b) = a, b
    n = count_a + count_b
    mean = (count_a * mean_a + count_b * mean_b) / n
    return n, mean, (count_a * C_a + count_b * C_b) / n


# %% 3: everything added, the means too
def merge(a, b):
    return tuple(x + y for x, y in zip(a, b))


# %% 4: the whole of W
def sketch(shards, rank):
    U, S, Vh = torch.linalg.svd(torch.cat(shards), full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


# %% 4: a covariance of n by n
def sketch(shards, rank):
    V = torch.linalg.eigh(sum(W_k.T @ W_k for W_k in shards))[1][:, -rank:]
    return torch.cat([W_k @ V for W_k in shards]), V.T


# %% 4: random, and left so
def sketch(shards, rank):
    V = torch.linalg.qr(torch.randn(shards[0].shape[1], rank))[0]
    return torch.cat([W_k @ V for W_k in shards]), V.T
