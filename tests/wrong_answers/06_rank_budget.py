"""Wrong answers to the exercises of lesson 6, one a cell: its exercise, and what is wrong."""

# %% 1: not multiples of 4
statistics = lrf.collect_statistics(model, calibration, loss="classes")
plan = lrf.allocate_ranks(lrf.rank_options(model, statistics), weight_budget(11))
parameters = lrf.count_parameters(lrf.factorize(model, plan))

# %% 1: multiples of 4 by rounding the best plan down
plan = {"fc1": 12, "fc2": 8, "fc3": None}
parameters = lrf.count_parameters(lrf.factorize(model, plan))

# %% 1: the biases forgotten
statistics = lrf.collect_statistics(model, calibration, loss="classes")
options = lrf.rank_options(model, statistics, multiple_of=4)
plan = lrf.allocate_ranks(options, weight_budget(11))
parameters = lrf.count_parameters(lrf.factorize(model, plan)) - 394

# %% 1: by the weight error
plan = lrf.allocate_ranks(lrf.rank_options(model, multiple_of=4), weight_budget(11))
parameters = lrf.count_parameters(lrf.factorize(model, plan))

# %% 2: an interval that contains zero as a difference
supported = "abe"

# %% 2: an interval that contains zero as equality
supported = "bce"

# %% 2: the last row overlooked
supported = "bde"

# %% 2: one is missing
supported = "b"

# %% 3: everything fits
trap = {"a": {1: (1, 10), 2: (2, 2)}, "b": {1: (1, 20), None: (4, 1)}}
trap_budget = 6

# %% 3: the large step is the steeper one, and greedy is right
trap = {"a": {1: (1, 10), 2: (2, 7)}, "b": {1: (1, 20), None: (4, 1)}}
trap_budget = 5

# %% 3: greedy fails, but by less than a factor of two
trap = {"a": {1: (1, 10), 2: (2, 2)}, "b": {1: (1, 11), None: (4, 1)}}
trap_budget = 5

# %% 3: nothing to lose: 0 is twice 0
trap = {"a": {1: (1, 0), 2: (2, 0)}, "b": {1: (1, 0), None: (4, 0)}}
trap_budget = 5

# %% 3: the stub with a budget
trap_budget = 7

# %% 4: not squared
exponents = (-1, 1, -1, 0, 0, 0)

# %% 4: the inputs of fc2 shrink, too
exponents = (-2, 2, -2, 2, 0, 0)

# %% 4: upside down
exponents = (2, -2, 2, 0, 0, 0)

# %% 4: in another order
exponents = (-2, -2, 0, 2, 0, 0)


# %% 5: without the budget
def bound(options, budget, slope):
    return sum(min(e + slope * c for c, e in t.values()) for t in options.values())


gap = 2.8


# %% 5: the gap of equal slopes
def bound(options, budget, slope):
    least = sum(min(e + slope * c for c, e in t.values()) for t in options.values())
    return least - slope * budget


gap = 9.2


# %% 5: the gap as a share
def bound(options, budget, slope):
    least = sum(min(e + slope * c for c, e in t.values()) for t in options.values())
    return least - slope * budget


gap = 0.028
