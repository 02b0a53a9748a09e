"""The compared models: what each is called, everywhere, and what it starts from."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the compared models.

    letter: in tables and questions; title: in words; run_name: of its folder, `{rank}`
    filled in; takes: what it starts from of D, some of 'factors' (of D's table),
    'blocks' (all else), 'weights' (D as it is); keep: what of the factors, as
    `init.keep` has it; is_taught: whether it learns D's predictions.
    """

    letter: str
    title: str
    run_name: str
    takes: tuple[str, ...] = ()
    keep: str = "all"
    is_taught: bool = False

    @property
    def is_fine_tuned(self) -> bool:
        """Whether it goes on from D's blocks, with a share of D's budget."""
        return "blocks" in self.takes or "weights" in self.takes


_SCRATCH, _FINE_TUNED = ("factors",), ("factors", "blocks")
ARMS = {
    "baseline": Arm("D", "baseline", "gpt_baseline"),
    "continued": Arm(
        "D+", "baseline, trained on", "gpt_baseline_continued", ("weights",)
    ),
    "pca": Arm("A", "PCA-scratch", "gpt_pca_k{rank}", _SCRATCH),
    "pca_finetune": Arm("B", "PCA-finetune", "gpt_pca_finetune_k{rank}", _FINE_TUNED),
    "pca_distill": Arm(
        "Bd", "PCA-distilled", "gpt_pca_distill_k{rank}", _FINE_TUNED, is_taught=True
    ),
    "random": Arm("C", "random-scratch", "gpt_random_lowrank_k{rank}"),
    # Controls of A: random but for one thing that A's factors have.
    "random_std": Arm(
        "E", "random, A's std", "gpt_random_std_k{rank}", _SCRATCH, "std"
    ),
    "random_spectrum": Arm(
        "F",
        "random, A's spectrum",
        "gpt_random_spectrum_k{rank}",
        _SCRATCH,
        "spectrum",
    ),
    "shuffled": Arm(
        "G", "A's rows, shuffled", "gpt_pca_shuffled_k{rank}", _SCRATCH, "rows"
    ),
}
FROM_RUN = "gpt_{arm}_from_{source}"  # run_name of what goes on from a run's weights
BY_LETTER = {arm.letter: arm for arm in ARMS.values()}
