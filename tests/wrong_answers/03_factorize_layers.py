"""Wrong answers to the exercises of lesson 3, one a cell: its exercise, and what is wrong."""

# %% 1: fewer parameters taken for less time
a, b, c, d = 2, 4, 4, 3

# %% 1: nothing refutes what sounds right
a, b, c, d = 0, 4, 0, 0

# %% 1: Figure 2 and Figure 3 exchanged
a, b, c, d = 3, 4, 0, 2


# %% 2: keeps a bias of random numbers
def merge(pair):
    first, second = pair
    layer = nn.Linear(first.in_features, second.out_features)
    with torch.no_grad():
        layer.weight.copy_(second.weight @ first.weight)
    return layer


# %% 2: the wrong way round
def merge(pair):
    first, second = pair
    layer = nn.Linear(first.in_features, second.out_features)
    with torch.no_grad():
        layer.weight.copy_(first.weight @ second.weight)
        layer.bias.copy_(second.bias)
    return layer


# %% 2: the bias is lost
def merge(pair):
    first, second = pair
    layer = nn.Linear(first.in_features, second.out_features, bias=False)
    with torch.no_grad():
        layer.weight.copy_(second.weight @ first.weight)
    return layer


# %% 2: the pair itself, not one layer
def merge(pair):
    return pair


# %% 3: only the layer of the lesson
small = lrf.factorize(model, {"fc2": 10})

# %% 3: accurate, and too large
small = lrf.factorize(model, {"fc1": 30, "fc2": 10})

# %% 3: the same rank everywhere
small = lrf.factorize(model, {"fc1": 20, "fc2": 20})

# %% 3: `model` itself, which is too large
small = model

# %% 4: the truncated SVD
A, B = lrf.truncated_svd(W, 9)
M = A @ B

# %% 4: full rank, so nothing changes
M = W

# %% 4: the mean of each row, not of each column
M = W - W.mean(1, keepdim=True)

# %% 4: one digit is never predicted
M = W.clone()
M[9] = 0

# %% 4: the mean row is subtracted twice
M = W - 2 * W.mean(0)
