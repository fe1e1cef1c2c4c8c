"""Wrong answers to the exercises of lesson 2, one a cell: its exercise, and what is wrong."""

# %% 1: percentage points taken for a fraction
images = 0.975 * 0.025 / 0.05**2
factor = 4
each = 2 * images

# %% 1: half the error, twice the images
images = round(0.975 * 0.025 / 0.0005**2)
factor = 2
each = 2 * images

# %% 1: as for one accuracy
images = round(0.975 * 0.025 / 0.0005**2)
factor = 4
each = images

# %% 1: the root of two on the wrong side
images = round(0.975 * 0.025 / 0.0005**2)
factor = 4
each = 2**0.5 * images

# %% 2: the largest difference in images, with many flips
supported = {"b", "c", "e"}

# %% 2: a mean below zero is not enough
supported = {"b", "d", "e"}

# %% 2: the best of twenty against one
supported = ["b", "e", "f"]

# %% 2: as if both networks of a had seen the same images
supported = "abe"

# %% 2: only the report with five seeds
supported = {"e"}


# %% 3: as many as were lost
def needed(lost):
    return lost


# %% 3: the error of the losses alone
def needed(lost):
    return max(0, round(lost - 1.96 * lost**0.5))


# %% 3: one too few
def needed(lost):
    won = 0
    while lost - won > 1.96 * (lost + won) ** 0.5:
        won += 1
    return max(0, won - 1)


# %% 4: each network sees images of its own
def bootstrap_error(first, second, labels):
    def balanced(values):
        draw = torch.randint(len(labels), (len(labels),))
        by_class = [values.double()[draw][labels[draw] == k].mean() for k in (0, 1)]
        return sum(by_class) / 2

    return 100 * torch.stack([balanced(second) - balanced(first) for _ in range(500)]).std()


# %% 4: the plain accuracy
def bootstrap_error(first, second, labels):
    gaps = second.double() - first.double()
    draws = torch.randint(len(gaps), (500, len(gaps)))
    return 100 * gaps[draws].mean(1).std()


# %% 4: a fraction, not percentage points
def bootstrap_error(first, second, labels):
    gaps = second.double() - first.double()
    by_class = [gaps[labels == k] for k in (0, 1)]
    return sum(gap.var() / len(gap) / 4 for gap in by_class) ** 0.5


# %% 4: the sum over the classes, not their mean
def bootstrap_error(first, second, labels):
    gaps = second.double() - first.double()
    by_class = [gaps[labels == k] for k in (0, 1)]
    return 100 * sum(gap.var() / len(gap) for gap in by_class) ** 0.5
