"""Wrong answers to the exercises of lesson 12, one a cell: its exercise, and what is wrong."""

# %% 1: float32
gib = 24 * 4 * (3 * 2048**2 + 5632**2) / 2**30

# %% 1: one block
gib = 8 * (3 * 2048**2 + 5632**2) / 2**30

# %% 1: GB, not GiB
gib = 24 * 8 * (3 * 2048**2 + 5632**2) / 1e9

# %% 1: Q, K, V and the two that widen read the same
gib = 24 * 8 * (6 * 2048**2 + 5632**2) / 2**30


# %% 2: all of the work
def half_gram(X, blocks):
    return X.T @ X


# %% 2: not mirrored
def half_gram(X, blocks):
    size = X.shape[1] // blocks
    C = X.new_zeros(X.shape[1], X.shape[1])
    for i in range(0, X.shape[1], size):
        C[i : i + size, i:] = X[:, i : i + size].T @ X[:, i:]
    return C


# %% 2: the blocks on the diagonal twice
def half_gram(X, blocks):
    size = X.shape[1] // blocks
    C = X.new_zeros(X.shape[1], X.shape[1])
    for i in range(0, X.shape[1], size):
        C[i : i + size, i:] = X[:, i : i + size].T @ X[:, i:]
    return C + C.T


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
