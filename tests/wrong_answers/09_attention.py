"""Wrong answers to the exercises of lesson 9, one a cell: its exercise, and what is wrong."""


# %% 1: keys only
def cache_bytes(layers, kv_heads, head_size, tokens, bytes_each):
    return layers * tokens * kv_heads * head_size * bytes_each


# %% 1: one layer
def cache_bytes(layers, kv_heads, head_size, tokens, bytes_each):
    return tokens * 2 * kv_heads * head_size * bytes_each


# %% 1: as if all heads shared one key
def cache_bytes(layers, kv_heads, head_size, tokens, bytes_each):
    return layers * tokens * 2 * head_size * bytes_each


# %% 2: as if keys were inputs
def values(keys, W_K, W_V):
    return keys @ W_V.T


# %% 2: the inverse, transposed the wrong way
def values(keys, W_K, W_V):
    return keys @ torch.linalg.inv(W_K) @ W_V.T


# %% 2: the inputs, not the values
def values(keys, W_K, W_V):
    return torch.linalg.solve(W_K, keys.T).T


# %% 3: the same weights, but not the smallest
def least_keys(k):
    return k


# %% 3: one number in place of a vector
def least_keys(k):
    return k - k.mean()


# %% 3: allowed, but not the smallest
def least_keys(k):
    return k - k[0]


# %% 4: without the bias
def output(p, z, A, b):
    return A @ (p @ z)


# %% 4: the bias once for each token
def output(p, z, A, b):
    return A @ (p @ z) + len(p) * b


# %% 4: all tokens alike
def output(p, z, A, b):
    return A @ z.mean(0) + b
