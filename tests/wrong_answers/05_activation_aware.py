"""Wrong answers to the exercises of lesson 5, one a cell: its exercise, and what is wrong."""

# %% 1: one logit alone: that class becomes likelier
z = torch.eye(10)[0]

# %% 1: the sum is zero, but the logits move against each other
z = torch.tensor([1.0, -1.0] * 5)

# %% 1: zero is no direction
z = torch.zeros(10)

# %% 1: the eigenvector of the largest eigenvalue
G = lrf.collect_statistics(model, images[:1000], ["fc3"], loss="classes")["fc3"].metric
z = torch.linalg.eigh(G).eigenvectors[:, -1]

# %% 1: nine numbers instead of ten
z = torch.ones(9)

# %% 2: the right run, but the other letter
control = "d"
net = lrf.factorize(model, {"fc1": 12})
lost = model.fc1.weight - net.fc1[1].weight @ net.fc1[0].weight
net.fc1[1].bias.data += (lost @ images.mean(0)).detach()
accuracy = 100 * lrf.accuracy(net, data.x_test, data.y_test)

# %% 2: the bias was never changed
control = "b"
net = lrf.factorize(model, {"fc1": 12})
accuracy = 100 * lrf.accuracy(net, data.x_test, data.y_test)

# %% 2: with the covariance, too
control = "b"
accuracy = 100 * lrf.accuracy(net, data.x_test, data.y_test)

# %% 2: the mean of what is kept, not of what is lost
control = "b"
net = lrf.factorize(model, {"fc1": 12})
kept = net.fc1[1].weight @ net.fc1[0].weight
net.fc1[1].bias.data += (kept @ images.mean(0)).detach()
accuracy = 100 * lrf.accuracy(net, data.x_test, data.y_test)

# %% 2: a share, not percent
control = "b"
net = lrf.factorize(model, {"fc1": 12})
lost = model.fc1.weight - net.fc1[1].weight @ net.fc1[0].weight
net.fc1[1].bias.data += (lost @ images.mean(0)).detach()
accuracy = lrf.accuracy(net, data.x_test, data.y_test)

# %% 3: without the temperature of the gradient
G = p.mean(0).diag() - p.T @ p / len(p)

# %% 3: one factor of T is missing
G = (p.mean(0).diag() - p.T @ p / len(p)) / 2

# %% 3: the mean of p before the product
G = (p.mean(0).diag() - torch.outer(p.mean(0), p.mean(0))) / 4

# %% 3: the sum over the images, not their mean
G = (p.sum(0).diag() - p.T @ p) / 4

# %% 3: the second part is missing
G = p.mean(0).diag() / 4


# %% 4: S is never undone
def whitened(W, C, r, epsilon):
    S = torch.linalg.cholesky(C + epsilon * C.diagonal().mean() * torch.eye(len(C)))
    A, B = lrf.truncated_svd(W @ S, r)
    return A @ B


# %% 4: the square root is S, not its transpose
def whitened(W, C, r, epsilon):
    S = torch.linalg.cholesky(C + epsilon * C.diagonal().mean() * torch.eye(len(C)))
    A, B = lrf.truncated_svd(W @ S.T, r)
    return torch.linalg.solve(S.T, A @ B, left=False)


# %% 4: ε itself, not a share of the diagonal
def whitened(W, C, r, epsilon):
    S = torch.linalg.cholesky(C + epsilon * torch.eye(len(C)))
    A, B = lrf.truncated_svd(W @ S, r)
    return torch.linalg.solve(S, A @ B, left=False)


# %% 4: undone before the truncation
def whitened(W, C, r, epsilon):
    A, B = lrf.truncated_svd(W, r)
    return A @ B
