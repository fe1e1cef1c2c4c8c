"""Wrong answers to the exercises of lesson 8, one a cell: its exercise, and what is wrong."""

# %% 1: weights, not MACs
rank = lrf.break_even_rank(96, 160 * 25)

# %% 1: the first rank that does not save
rank = 96 * 160 * 25 * 16**2 // (96 * 32**2 + 160 * 25 * 16**2) + 1

# %% 1: a layer without the stride
unstrided = nn.Conv2d(96, 160, 5, padding=2)
rank = (cost(unstrided, "dense", 1, (32, 32)) - 1) // cost(unstrided, "in", 1, (32, 32))

# %% 1: the scheme "out"
rank = (cost(layer, "dense", 1, (32, 32)) - 1) // cost(layer, "out", 1, (32, 32))


# %% 2: the vertical filter first
def split_horizontal(layer, r):
    return split_spatial(layer, r)


# %% 2: all of stride and padding
def split_horizontal(layer, r):
    W = layer.weight.detach()
    m, n, h, w = W.shape
    A, B = lrf.truncated_svd(W.permute(1, 3, 0, 2).reshape(n * w, m * h), r)
    first = as_conv(A.view(n, w, r).permute(2, 0, 1)[:, :, None], **geometry(layer))
    last = as_conv(B.view(r, m, h).transpose(0, 1)[..., None], layer.bias)
    return nn.Sequential(first, last)


# %% 2: the halves exchanged
def split_horizontal(layer, r):
    W = layer.weight.detach()
    m, n, h, w = W.shape
    A, B = lrf.truncated_svd(W.permute(1, 3, 0, 2).reshape(n * w, m * h), r)
    first = as_conv(A.view(n, w, r).permute(2, 0, 1)[:, :, None], **geometry(layer, [0]))
    last = as_conv(B.view(r, m, h).transpose(0, 1)[..., None], layer.bias, **geometry(layer, [1]))
    return nn.Sequential(first, last)


# %% 3: not fitted
small = apply(model, {"conv4": ("out", 16)})

# %% 3: the classifier too
small = refit(model, apply(model, {"conv4": ("out", 16)}), x_calibration[:300])

# %% 3: the scheme "in"
small = refit(model, apply(model, {"conv4": ("in", 16)}), x_calibration[:300], classifier=False)

# %% 3: half of the rank
small = refit(model, apply(model, {"conv4": ("out", 8)}), x_calibration[:300], classifier=False)

# %% 4: without the last 1×1
fraction = (1 / 2 + 9 / 4) / (1 + 9)

# %% 4: half of n, as for Tucker-2
fraction = 1 / 2

# %% 4: the core has r² weights a position, not r n
fraction = (1 / 2 + 9 / 2 + 1 / 2) / (1 + 9)

# %% 4: without the 1×1 of "in"
fraction = (1 / 2 + 9 / 4 + 1 / 2) / 9
