"""The compared models: their names, initial weights, colours and markers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the compared models.

    Attributes:
      letter: short name in tables and questions.
      title: long name.
      meaning: definition in the report.
      run_name: name of its run folder, where `{rank}` stands for the rank.
      colour: of its lines, as in CSS.
      marker: of its points: a shape of Vega, or its path.
      takes: the weights it starts from: 'factors' (of D's table), 'blocks' (D's other
        weights), 'weights' (all weights of D).
      keep: which property of the factors it keeps, a value of `init.keep`.
      has_bands_of_a: whether it copies the bands of A, if A has several: their sizes,
        ranks and tokens, but no weights.
      is_taught: whether it learns D's predictions.
      rate_share: the knob with its share of D's learning rate; empty: D's own rate.
    """

    letter: str
    title: str
    meaning: str
    run_name: str
    colour: str = "#6b6b6b"
    marker: str = "circle"
    takes: tuple[str, ...] = ()
    keep: str = "all"
    has_bands_of_a: bool = False
    is_taught: bool = False
    rate_share: str = ""

    @property
    def is_fine_tuned(self) -> bool:
        """Whether it continues from D's blocks, with a share of D's budget."""
        return "blocks" in self.takes or "weights" in self.takes

    def needs_factors(self, has_bands: bool) -> bool:
        """Whether it needs factors of D's table, or copies the bands that A has."""
        return "factors" in self.takes or (has_bands and self.has_bands_of_a)


FINETUNE_SHARE = "finetune.learning_rate_share"
PCA_SHARE = "scratch.pca_learning_rate_share"
RANDOM_SHARE = "scratch.random_learning_rate_share"

# Tables and legends show the arms in this order. Colour-blind readers can tell most of
# the colours apart (they are Okabe and Ito's); the markers differ in black and white.
ARMS = {
    "baseline": Arm(
        letter="D",
        title="baseline",
        meaning="full token table, everything trained from random initialisation",
        run_name="gpt_baseline",
        colour="#3a3a3a",
        marker="square",
    ),
    "continued": Arm(
        letter="D+",
        title="baseline, trained further",
        meaning="D, trained further for as many steps as B",
        run_name="gpt_baseline_continued",
        colour="#8c8c8c",
        marker="cross",
        takes=("weights",),
        rate_share=FINETUNE_SHARE,
    ),
    "pca": Arm(
        letter="A",
        title="PCA-scratch",
        meaning="D's token table, factorized; all other weights start random",
        run_name="gpt_pca_k{rank}",
        colour="#0072b2",
        marker="circle",
        takes=("factors",),
        rate_share=PCA_SHARE,
    ),
    "pca_finetune": Arm(
        letter="B",
        title="PCA-finetune",
        meaning="D's token table, factorized, and all other weights of D; fine-tuned",
        run_name="gpt_pca_finetune_k{rank}",
        colour="#d55e00",
        marker="diamond",
        takes=("factors", "blocks"),
        rate_share=FINETUNE_SHARE,
    ),
    "pca_distill": Arm(
        letter="Bd",
        title="PCA-distilled",
        meaning="as B, but trained on D's predictions",
        run_name="gpt_pca_distill_k{rank}",
        colour="#f0a500",
        marker="M0,-1L.5,0L0,1L-.5,0Z",
        takes=("factors", "blocks"),
        is_taught=True,
        rate_share=FINETUNE_SHARE,
    ),
    "random": Arm(
        letter="C",
        title="random-scratch",
        meaning="a table of A's size, in A's bands; all weights start random",
        run_name="gpt_random_lowrank_k{rank}",
        colour="#009e73",
        marker="triangle-up",
        has_bands_of_a=True,
        rate_share=RANDOM_SHARE,
    ),
    # Controls of A: random, except for one property of A's factors.
    "random_std": Arm(
        letter="E",
        title="random, A's scale",
        meaning="as A, but random factors with the root mean square of A's",
        run_name="gpt_random_std_k{rank}",
        colour="#cc79a7",
        marker="triangle-down",
        takes=("factors",),
        keep="std",
        rate_share=PCA_SHARE,
    ),
    "random_spectrum": Arm(
        letter="F",
        title="random, A's spectrum",
        meaning="as A, but random factors with the singular values of A's table",
        run_name="gpt_random_spectrum_k{rank}",
        colour="#a88c00",
        marker="triangle-left",
        takes=("factors",),
        keep="spectrum",
        rate_share=PCA_SHARE,
    ),
    "shuffled": Arm(
        letter="G",
        title="A's rows, shuffled",
        meaning="as A, but each token has the row of another token",
        run_name="gpt_pca_shuffled_k{rank}",
        colour="#56b4e9",
        marker="triangle-right",
        takes=("factors",),
        keep="rows",
        rate_share=PCA_SHARE,
    ),
}
# Name of a run that continues from another run's weights.
FROM_RUN = "gpt_{arm}_from_{source}"


def arm_from_run(is_compressed: bool, is_taught: bool) -> str:
    """The arm, a key of `ARMS`, of a run that continues from another run's weights.

    is_compressed: the table is compressed, or was at the start; is_taught: the run
    learns a teacher's predictions.
    """
    if is_taught:
        return "pca_distill"
    return "pca_finetune" if is_compressed else "continued"
