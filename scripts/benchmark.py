"""The cost of ``rank_sweep`` as multiples of one dense evaluation of the test set, on one thread and on all."""

import os

import lrf_utils as lrf


def main() -> None:
    data, model = lrf.load_mnist(), lrf.load_baseline(0)
    small = lrf.factorize(model, {"fc2": 64})
    test = data.x_test, data.y_test
    for threads in sorted({1, os.cpu_count()}):
        dense = lrf.measure(lambda: lrf.accuracy(model, *test), threads).median
        sweep = lrf.measure(lambda: lrf.rank_sweep(model, "fc2", *test), threads, max_run_time=5).median
        one_rank = lrf.measure(lambda: lrf.accuracy(small, *test), threads).median
        print(
            f"{threads} thread(s): dense evaluation {1e3 * dense:.1f} ms; all 128 ranks in one sweep "
            f"{sweep / dense:.1f}×; one model per rank about {128 * one_rank / dense:.0f}×"
        )


if __name__ == "__main__":
    main()
