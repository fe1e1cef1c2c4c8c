"""Wrong answers to the exercises of lesson 8, one a cell: its exercise, and what is wrong."""

# %% 1: the third saves nothing
ranks = (51, 204, 96)

# %% 1: the first ranks that do not save
ranks = (52, 205, 96)

# %% 1: not whole
ranks = (51.2, 204.8, 95)

# %% 1: a 3×3 layer in the scheme "out"
ranks = (51, 204, 57)


# %% 2: the branch alone
def fit_branch(z, Y1, Y2, Y1_small):
    return torch.linalg.lstsq(z, Y2).solution.T


# %% 2: the shortcut twice
def fit_branch(z, Y1, Y2, Y1_small):
    return torch.linalg.lstsq(z, Y1 + Y2).solution.T


# %% 2: the error with the wrong sign
def fit_branch(z, Y1, Y2, Y1_small):
    return torch.linalg.lstsq(z, Y2 + Y1_small - Y1).solution.T


# %% 2: not transposed
def fit_branch(z, Y1, Y2, Y1_small):
    return torch.linalg.lstsq(z, Y1 + Y2 - Y1_small).solution


# %% 3: all rows alike
s = torch.ones(8)

# %% 3: a row is gone
s = torch.zeros(8)
s[0] = 1

# %% 3: negative
s = -torch.ones(8)
s[0] = 100

# %% 3: not large enough
s = torch.ones(8)
s[0] = 3

# %% 3: rows of equal norm
s = 1 / W1.norm(dim=1)


# %% 4: the vertical filter first
def split_horizontal(layer, r):
    import lrf_convs

    return lrf_convs.split_conv(layer, "spatial", 12)


# %% 4: other weights
def split_horizontal(layer, r):
    first = nn.Conv2d(4, r, (1, 5), (1, 1), (0, 2), bias=False)
    return nn.Sequential(first, nn.Conv2d(r, 6, (3, 1), (2, 1), (1, 0)))


# %% 4: half of the rank
def split_horizontal(layer, r):
    m, n, h, w = layer.weight.shape
    W = layer.weight.detach().permute(1, 3, 0, 2).reshape(n * w, m * h)
    (A, B), r = lrf.truncated_svd(W, r // 2), r // 2
    first, last = nn.Conv2d(n, r, (1, w), padding=(0, 2)), nn.Conv2d(r, m, (h, 1), (2, 1), (1, 0))
    first.bias, last.bias = None, layer.bias
    first.weight.data = A.view(n, w, r).permute(2, 0, 1)[:, :, None]
    last.weight.data = B.view(r, m, h).transpose(0, 1)[..., None]
    return nn.Sequential(first, last)


# %% 5: low rank for everyone
choices, share = "aaa", 29.2

# %% 5: a narrower network without data
choices, share = "bba", 29.2

# %% 5: as a fraction
choices, share = "bca", 0.292

# %% 5: only the shortcuts
choices, share = "bca", 5.7
