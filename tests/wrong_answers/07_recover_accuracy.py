"""Wrong answers to the exercises of lesson 7, one a cell: its exercise, and what is wrong."""

# %% 1: more seeds do not make it fair
control = "c"
difference = (runs["12x, 10 epochs"] - runs["dense, 3 + 10 epochs"]).mean()

# %% 1: the dense network as it was
control = "b"
difference = (runs["12x, 10 epochs"] - runs["dense, 3 epochs"]).mean()

# %% 1: the dense network after five epochs, not ten
control = "b"
difference = (runs["12x, 10 epochs"] - runs["dense, 3 + 5 epochs"]).mean()

# %% 1: the untrained network
control = "b"
difference = (runs["12x, no training"] - runs["dense, 3 + 10 epochs"]).mean()


# %% 2: positions, not gaps
def offsets(row):
    return row.nonzero()[:, 0].tolist()


# %% 2: no extra entries
def offsets(row):
    places = row.nonzero()[:, 0]
    return (places.diff(prepend=torch.tensor([-1])) - 1).tolist()


# %% 2: distances instead of zeros between
def offsets(row):
    places = row.nonzero()[:, 0]
    return places.diff(prepend=torch.tensor([-1])).tolist()


# %% 2: the extra entry fills no position of its own
def offsets(row):
    found, gap = [], 0
    for value in row.tolist():
        if value != 0:
            while gap > 31:
                found.append(31)
                gap -= 31
            found.append(gap)
            gap = 0
        else:
            gap += 1
    return found


# %% 3: the same norm as a whole, not column by column
def balance(A, B):
    c = (B.norm() / A.norm()).sqrt()
    return c * A, B / c


# %% 3: all of the scale in A
def balance(A, B):
    U, S, Vh = torch.linalg.svd(A @ B, full_matrices=False)
    return U[:, : len(B)] * S[: len(B)], Vh[: len(B)]


# %% 3: column by column, so only the diagonals agree
def balance(A, B):
    c = (B.norm(dim=1) / A.norm(dim=0)).sqrt()
    return A * c, B / c[:, None]


# %% 4: without the temperature's factors
def gradient(s, z, T):
    return (s / T).softmax(1) - (z / T).softmax(1)


# %% 4: without the chain rule
def gradient(s, z, T):
    return T**2 * ((s / T).softmax(1) - (z / T).softmax(1))


# %% 4: the direction of the step, not the gradient
def gradient(s, z, T):
    return T * ((z / T).softmax(1) - (s / T).softmax(1))


# %% 5: as if the product itself were trained
def movement(A, B, G, eta):
    return -eta * G


# %% 5: the change of A is forgotten
def movement(A, B, G, eta):
    return -eta * (A @ A.T @ G)


# %% 5: uphill
def movement(A, B, G, eta):
    return eta * (G @ B.T @ B + A @ A.T @ G)
