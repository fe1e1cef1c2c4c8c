"""Wrong answers to the exercises of lesson 1, one a cell: its exercise, and what is wrong."""

# %% 1: half the squared norm, not half the norm
share = 0.5
r = (S.square().cumsum(0) < share * S.square().sum()).sum().item() + 1

# %% 1: one rank too few
share = 0.75
r = (S.square().cumsum(0) < share * S.square().sum()).sum().item()

# %% 1: singular values without the squares
r = ((S / S.sum()).cumsum(0) < 0.5).sum().item() + 1
share = 0.75

# %% 1: what is dropped, not what is kept
r = sum(S[i:].norm() / S.norm() > 0.5 for i in range(len(S))).item()
share = 0.25

# %% 2: 10.57 rounded up
r = 11
mosaic_error = (torch.linalg.svdvals(mosaic)[20:].norm() / mosaic.norm()).item()
digits_error = (torch.linalg.svdvals(digits)[11:].norm() / digits.norm()).item()

# %% 2: the same rank instead of the same number of stored numbers
r = 20
mosaic_error = (torch.linalg.svdvals(mosaic)[20:].norm() / mosaic.norm()).item()
digits_error = (torch.linalg.svdvals(digits)[20:].norm() / digits.norm()).item()

# %% 2: the other way round
r = 10
digits_error = (torch.linalg.svdvals(mosaic)[20:].norm() / mosaic.norm()).item()
mosaic_error = (torch.linalg.svdvals(digits)[10:].norm() / digits.norm()).item()

# %% 2: squared
r = 10
mosaic_error = (torch.linalg.svdvals(mosaic)[20:].norm() / mosaic.norm()).square().item()
digits_error = (torch.linalg.svdvals(digits)[10:].norm() / digits.norm()).square().item()

# %% 3: more patterns are not other patterns
control = "a"
net.fc2.weight.data = (Q @ Q.T @ W).float()
accuracy = 100 * lrf.accuracy(net, data.x_test, data.y_test)

# %% 3: repeats what is known
control = "d"
net.fc2.weight.data = (Q @ Q.T @ W).float()
accuracy = 100 * lrf.accuracy(net, data.x_test, data.y_test)

# %% 3: the weight was never replaced
control = "c"
accuracy = 100 * lrf.accuracy(net, data.x_test, data.y_test)

# %% 3: a share, not percent
control = "c"
net.fc2.weight.data = (Q @ Q.T @ W).float()
accuracy = lrf.accuracy(net, data.x_test, data.y_test)

# %% 4: the best for the weight
A, B = lrf.truncated_svd(W, 5)
M = A @ B

# %% 4: the strongest directions of the inputs
P = torch.linalg.svd(X, full_matrices=False).U[:, :5]
M = W @ P @ P.T

# %% 4: rank 6
U = torch.linalg.svd(W @ X, full_matrices=False).U[:, :6]
M = U @ (U.T @ W)

# %% 4: the left vectors of W, not of W X
U = torch.linalg.svd(W, full_matrices=False).U[:, :5]
M = U @ (U.T @ W)

# %% 5: no G at all
C, D = A, B
store = 127 * (128 + 256)

# %% 5: the inverse of G is forgotten
G = torch.linalg.inv(A[:127])
C, D = A @ G, B
store = 127 + 127 * 256

# %% 5: the identity is stored, too
G = torch.linalg.inv(A[:127])
C, D = A @ G, A[:127] @ B
store = C.numel() + D.numel()

# %% 5: the row below the identity is forgotten
G = torch.linalg.inv(A[:127])
C, D = A @ G, A[:127] @ B
store = 127 * 256
