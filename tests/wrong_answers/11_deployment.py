"""Wrong answers to the exercises of lesson 11, one a cell: its exercise, and what is wrong."""


# %% 1: the size of the views, not of their storage
def storage_bytes(state):
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


# %% 1: shared storage counted twice
def storage_bytes(state):
    return sum(tensor.untyped_storage().nbytes() for tensor in state.values())


# %% 1: the address of the view, not of its storage
def storage_bytes(state):
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in state.values()}.values())


# %% 2: smaller, not of equal size
rival, cost = "b", 1

# %% 2: says what low rank does alone
rival, cost = "a", 1

# %% 2: four times the bytes
rival, cost = "d", 1

# %% 2: bytes, not bits
rival, cost = "c", 1 / 8

# %% 2: one factor only
rival, cost = "c", 1 / 2


# %% 3: bits taken for bytes
def meeting_point(m, n, rank, bits, bandwidth, rate):
    return bits * rate / bandwidth


# %% 3: upside down
def meeting_point(m, n, rank, bits, bandwidth, rate):
    return bits / 8 * bandwidth / rate


# %% 3: a pair has fewer MACs, but also fewer bytes
def meeting_point(m, n, rank, bits, bandwidth, rate):
    point = bits / 8 * rate / bandwidth
    return point if rank is None else point * m * n / (rank * (m + n))


# %% 4: the number of entries
def folded(model, m, n):
    return any(np.prod(constant.dims) == m * n for constant in model.graph.initializer)


# %% 4: not transposed
def folded(model, m, n):
    return any(list(constant.dims) == [m, n] for constant in model.graph.initializer)


# %% 4: only the first constant
def folded(model, m, n):
    return sorted(model.graph.initializer[0].dims) == sorted([m, n])


# %% 4: more than a pair of rank 2 has
def folded(model, m, n):
    return sum(np.prod(constant.dims) for constant in model.graph.initializer) > 2 * (m + n)
