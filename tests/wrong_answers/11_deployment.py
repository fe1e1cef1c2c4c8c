"""Wrong answers to the exercises of lesson 11, one a cell: its exercise, and what is wrong."""


# %% 1: the bits are forgotten
def equal_rank(m, n, dense_bits, pair_bits):
    return m * n // (m + n)


# %% 1: the bits the wrong way round
def equal_rank(m, n, dense_bits, pair_bits):
    return m * n * pair_bits // ((m + n) * dense_bits)


# %% 1: not a whole number
def equal_rank(m, n, dense_bits, pair_bits):
    return m * n * dense_bits / ((m + n) * pair_bits)


# %% 2: the size of the views, not of their storage
def storage_bytes(state):
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


# %% 2: shared storage counted twice
def storage_bytes(state):
    return sum(tensor.untyped_storage().nbytes() for tensor in state.values())


# %% 2: the address of the view, not of its storage
def storage_bytes(state):
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in state.values()}.values())


# %% 3: bits taken for bytes
def meeting_point(bits, bandwidth, rate):
    return bits * rate / bandwidth


# %% 3: upside down
def meeting_point(bits, bandwidth, rate):
    return bits / 8 * bandwidth / rate


# %% 3: fewer bits take less time to fetch, not more
def meeting_point(bits, bandwidth, rate):
    return 8 / bits * rate / bandwidth


# %% 4: forgets steps and biases
def most_bits(m, n, rank, budget):
    return min(8, 8 * budget // (rank * (m + n)))


# %% 4: the size of the dense layer
def most_bits(m, n, rank, budget):
    return min(8, 8 * (budget - 2 * (rank + m) - 2 * m) // (m * n))


# %% 4: rounds up
def most_bits(m, n, rank, budget):
    return max(0, min(8, round(8 * (budget - 2 * (rank + m) - 2 * m) / (rank * (m + n)))))


# %% 5: the error, not its square
bit_factor, rank_factor = 1 / 2, 1 / 4

# %% 5: not squared
bit_factor, rank_factor = 1 / 4, 1 / 2

# %% 5: upside down
bit_factor, rank_factor = 4, 4

# %% 5: what the next singular value holds
bit_factor, rank_factor = 1 / 4, 3 / 4
