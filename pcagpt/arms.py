"""The compared models: what each is called, everywhere."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the compared models.

    letter: in tables and questions; title: in words; run_name: of its folder, `{rank}`
    filled in; config_file: that trains it.
    """

    letter: str
    title: str
    run_name: str
    config_file: str


ARMS = {
    "baseline": Arm("D", "baseline", "gpt_baseline", "configs/baseline.py"),
    "pca": Arm("A", "PCA-scratch", "gpt_pca_k{rank}", "configs/pca_k128.py"),
    "pca_finetune": Arm(
        "B",
        "PCA-finetune",
        "gpt_pca_finetune_k{rank}",
        "configs/pca_finetune_k128.py",
    ),
    "random": Arm(
        "C", "random-scratch", "gpt_random_lowrank_k{rank}", "configs/random_k128.py"
    ),
}
FROM_RUN = "gpt_{arm}_from_{source}"  # run_name of what goes on from a run's weights
TITLES = {arm.letter: arm.title for arm in ARMS.values()}
