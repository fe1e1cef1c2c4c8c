"""Wrong answers to the exercises of lesson 9, one a cell: its exercise, and what is wrong."""


# %% 1: without the scales
def cache_bytes(layers, heads, size, bits, group):
    return 2 * layers * heads * size * bits / 8


# %% 1: with scales at 16 bits, too
def cache_bytes(layers, heads, size, bits, group):
    return 2 * layers * heads * size * (bits + 32 / group) / 8


# %% 1: keys only
def cache_bytes(layers, heads, size, bits, group):
    scales = 0 if bits == 16 else 32 / group
    return layers * heads * size * (bits + scales) / 8


# %% 1: a step, but no offset
def cache_bytes(layers, heads, size, bits, group):
    scales = 0 if bits == 16 else 16 / group
    return 2 * layers * heads * size * (bits + scales) / 8


# %% 1: in bits
def cache_bytes(layers, heads, size, bits, group):
    scales = 0 if bits == 16 else 32 / group
    return 2 * layers * heads * size * (bits + scales)


# %% 2: every value is expanded
def output(p, z, A, b):
    return p @ (z @ A.T + b)


# %% 2: without the bias
def output(p, z, A, b):
    return A @ (p @ z)


# %% 2: the bias once for each token
def output(p, z, A, b):
    return A @ (p @ z) + len(p) * b


# %% 3: the inverse
def partner(M):
    return torch.linalg.inv(M)


# %% 3: not conjugated
def partner(M):
    return torch.linalg.inv(M).T


# %% 3: for unitary matrices only
def partner(M):
    return M


# %% 3: not inverted
def partner(M):
    return M.conj().T


# %% 4: the smallest cache for everybody
services = "ccc"
tokens = 6.03

# %% 4: expanding at every step where a kernel is there for 4 bits
services = "cca"
tokens = 6.03

# %% 4: a short conversation needs no compression
services = "bcb"
tokens = 6.03

# %% 4: the attention's weights alone
services = "bca"
tokens = 2

# %% 4: expanding keys only
services = "bca"
tokens = 12.06
