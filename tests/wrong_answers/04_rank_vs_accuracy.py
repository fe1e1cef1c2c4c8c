"""Wrong answers to the exercises of lesson 4, one a cell: its exercise, and what is wrong."""

# %% 1: the lesson's layer
sweep = lrf.rank_sweep(model, "fc2", data.x_test, data.y_test, [1, 2, 5, 10, 15, 25, 50, 128])
first = min(rank for rank in sweep if sweep[rank] >= sweep[128] - 0.01)

# %% 1: fractions taken for percent
sweep = lrf.rank_sweep(model, "fc1", data.x_test, data.y_test, [1, 2, 5, 10, 15, 25, 50, 256])
first = min(rank for rank in sweep if sweep[rank] >= sweep[256] - 1)

# %% 1: a tenth of the threshold
sweep = lrf.rank_sweep(model, "fc1", data.x_test, data.y_test, [1, 2, 5, 10, 15, 25, 50, 256])
first = min(rank for rank in sweep if sweep[rank] >= sweep[256] - 0.001)

# %% 1: guessed from fc2
sweep = lrf.rank_sweep(model, "fc1", data.x_test, data.y_test, [1, 2, 5, 10, 15, 25, 50, 256])
first = 10

# %% 1: on training images
x, y = data.x_train[:10_000], data.y_train[:10_000]
sweep = lrf.rank_sweep(model, "fc1", x, y, [1, 2, 5, 10, 15, 25, 50, 256])
first = 25

# %% 2: classes and images exchanged
figures = [5, 2, 6, 1, 3, 4]

# %% 2: the curve of the accuracies cannot show so small a loss
figures = [4, 1, 6, 2, 3, 5]

# %% 2: the order of the figures
figures = [1, 2, 3, 4, 5, 6]


# %% 3: the standard deviation, not the standard error
def standard_errors(before, after):
    return (after - before).std(), (before.var() + after.var()) ** 0.5


# %% 3: deviations added, not variances
def standard_errors(before, after):
    n = len(before)
    return (after - before).std() / n**0.5, (before.std() + after.std()) / n**0.5


# %% 3: in the other order
def standard_errors(before, after):
    n = len(before)
    unpaired = ((before.var() + after.var()) / n) ** 0.5
    return unpaired, (after - before).std() / n**0.5


# %% 3: divided by n, not by n - 1
def standard_errors(before, after):
    n = len(before)
    paired = (after - before).std(correction=0) / n**0.5
    return paired, ((before.var() + after.var()) / n) ** 0.5


# %% 4: what is there, not what is missing
def missing(inputs, rank):
    return (inputs @ Vh[:rank].T * S[:rank]).norm(dim=1)


# %% 4: without the singular values
def missing(inputs, rank):
    return (inputs @ Vh[rank:].T).norm(dim=1)


# %% 4: a bound, not the distance
def missing(inputs, rank):
    return S[rank:].norm() * inputs.norm(dim=1)


# %% 4: one term too few
def missing(inputs, rank):
    return (inputs @ Vh[rank + 1 :].T * S[rank + 1 :]).norm(dim=1)
