"""The two tables of an untied model, compressed one by one.

Most models have one table for input and head. Its side is "", and all statistics count.
"""

import numpy as np

from pcagpt.factorization import SecondOrder, Statistics
from pcagpt.run.calibrate import SIDES

INPUT, OUTPUT = SIDES


def seen_by(side: str, statistics: Statistics) -> Statistics:
    """The statistics that weight the errors of the table of a side.

    Input: `probability` gets the value of `frequency`, and `hidden_moment` gets that of
    `gradient_moment`. `hidden_mean`, `gradient_moment` and `context_moment` become 0.
    Output: `frequency` gets the value of `probability`, with the sum 1, and
    `gradient_moment` becomes 0. All other fields stay.
    """
    if not side:
        return statistics
    nothing_DD = np.zeros_like(statistics.gradient_moment)
    if side == OUTPUT:
        share_V = statistics.probability / statistics.probability.sum()
        return statistics._replace(frequency=share_V, gradient_moment=nothing_DD)
    return statistics._replace(
        probability=statistics.frequency,
        hidden_mean=np.zeros_like(statistics.hidden_mean),
        hidden_moment=statistics.gradient_moment,
        gradient_moment=nothing_DD,
        context_moment=nothing_DD,
    )


def counted_by(side: str, loss: SecondOrder) -> SecondOrder:
    """A second-order loss, with 0 for the side that is not compressed."""
    unused = {INPUT: "head", OUTPUT: "input"}.get(side)
    return loss._replace(**{unused: 0.0}) if unused else loss
