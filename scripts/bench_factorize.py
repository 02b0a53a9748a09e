"""Times every factorization method on a random table of GPT-2 small's size.

python scripts/bench_factorize.py
"""

import time

import numpy as np

from pcagpt import factorize

VOCAB_SIZE, WIDTH, RANKS, BANDS = 50_257, 768, (32, 64, 128, 256, 384, 768), (7, 12)


def random_model() -> tuple[np.ndarray, factorize.Statistics]:
    """A table and statistics that take as long as a trained model's."""
    random = np.random.default_rng(0)
    table_VD = random.normal(scale=0.1, size=(VOCAB_SIZE, WIDTH)).astype(np.float32)
    spread = random.normal(size=(2 * WIDTH, WIDTH))
    moment_DD = spread.T @ spread / WIDTH
    probability_V = random.dirichlet(np.full(VOCAB_SIZE, 0.05))
    known = factorize.Statistics(
        frequency=probability_V,
        probability=probability_V,
        hidden_mean=random.normal(size=WIDTH),
        hidden_moment=moment_DD,
        gradient_moment=moment_DD / 10,
        context_moment=random.normal(scale=0.01, size=(WIDTH, WIDTH)),
    )
    return table_VD, known


def main() -> None:
    """Prints seconds: of each solve, of cutting it to every rank, and of bands."""
    table_VD, known = random_model()
    began = time.monotonic()
    print(f"{'method':<12}{'solve':>8}{'ranks':>8}   seconds")
    for method in factorize.METHODS:
        start = time.monotonic()
        factors = factorize.by_method(table_VD, method, known)
        solved = time.monotonic()
        for rank in RANKS:
            factorize.truncate(factors, rank)
        cut = time.monotonic()
        print(f"{method:<12}{solved - start:8.1f}{cut - solved:8.1f}", flush=True)
    print(f"{'all':<12}{time.monotonic() - began:8.1f}")
    weighting = factorize.METHODS["context"](table_VD, known)
    for bands in BANDS:
        start = time.monotonic()
        budget = factorize.budget_of_rank(VOCAB_SIZE, WIDTH, 128)
        factorize.banded(table_VD, weighting, bands, budget)
        seconds = time.monotonic() - start
        print(f"context in {bands} bands at k = 128's size {seconds:.1f}")


if __name__ == "__main__":
    main()
