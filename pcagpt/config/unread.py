"""Which knobs have no effect beside the others."""

from collections.abc import Iterator

from pcagpt.arms import ARMS, FINETUNE_SHARE, PCA_SHARE, RANDOM_SHARE
from pcagpt.config.checks import check_rules, trained_arms
from pcagpt.config.schema import KNOBS, Settings
from pcagpt.config.tasks import OF_BARE_TABLE, RECOVERY, readers_of
from pcagpt.errors import UserError
from pcagpt.methods import METHODS

# What `factorize` reads only to measure statistics on a run.
_ONLY_MEASURING = (
    *("data.source", "train.batch_size", "train.loss_chunks", "mesh.data", "mesh.fsdp"),
    *(f"model.{name}" for name in ("compute_dtype", "attention", "kernels")),
)

_OF_PROCESSES = tuple(
    f"distributed.{name}"
    for name in ("coordinator_address", "num_processes", "process_id")
)


def validate(settings: Settings) -> None:
    """Does what `check_rules` does, and refuses knobs that the task does not read."""
    opens_model = bool(settings.model_path or settings.init.weights_from)
    check_rules(settings, knows_sizes=not opens_model)
    _check_read(settings)


def _check_read(settings: Settings) -> None:
    """A knob is refused if the task does not read it."""
    given, task = settings.given, settings.task
    does = {task}
    if task == "compress" and settings.compress.recover_ranks:
        does.add(RECOVERY)
    for path in filter(given.__contains__, KNOBS):
        tasks, remedy = readers_of(path)
        if does.isdisjoint(tasks):
            this = "an experiment" if task == "experiment" else f"task {task}"
            raise UserError(
                f"{path} is set for {this}, but only {', '.join(tasks)} can read it: "
                f"{remedy}"
            )
    rank, ranks = settings.model.n_embd_wte, settings.ranks
    if task == "train" and rank and "ranks" in given and ranks != (rank,):
        raise UserError(
            f"ranks is {ranks}, but one model is trained, and its model.n_embd_wte is "
            f"{rank}: set only --config.model.n_embd_wte"
        )
    for path, is_read, reason in read_if(settings, does):
        if path in given and not is_read:
            raise UserError(f"{path} is set, but {reason}")


def read_if(settings: Settings, does: set[str]) -> Iterator[tuple[str, bool, str]]:
    """(knob that the task reads in some cases, whether it does, why not).

    `does`: the task, and `RECOVERY` if it also does that.
    """
    reason = "only several processes read it: add --config.distributed.enabled=True"
    for path in _OF_PROCESSES:
        yield path, settings.distributed.enabled, reason
    is_constant = settings.train.schedule == "constant"
    reason = "train.schedule is 'constant', which does not read it: choose linear or "
    yield "train.final_learning_rate_share", not is_constant, f"{reason}cosine"
    yield from _of_factors(settings)
    init, arms = settings.init, [ARMS[arm] for arm in trained_arms(settings)]
    is_taught = any(arm.is_taught for arm in arms) and not init.weights_from
    reason = "no model has a teacher: leave it out, or name the arm pca_distill"
    has_teacher = is_taught or bool(settings.distill.teacher) or RECOVERY in does
    yield "distill.share", has_teacher, reason
    # The config of an experiment may serve for other arms than it names.
    if settings.task == "train":
        rate, is_fine_tuned = arms[0].rate_share, arms[0].is_fine_tuned
        reason = f"the {settings.arm} model does not read it: leave it out"
        if init.weights_from:
            rate, is_fine_tuned = FINETUNE_SHARE, True
            reason = "a run from init.weights_from does not read it: leave it out"
        yield "finetune.steps_share", is_fine_tuned, reason
        for knob in (FINETUNE_SHARE, PCA_SHARE, RANDOM_SHARE):
            yield knob, rate == knob, reason
    if settings.task == "compress" and settings.is_of_bare_table:
        reason = "a table without its model has no text and no loss: leave it out, or "
        for name in sorted(KNOBS.keys() - OF_BARE_TABLE):
            yield name, name.startswith("distributed."), f"{reason}give the model"
    for bound in settings.compress.bounds:
        reason = f"compress.{bound} is set, too, and does not read it: leave it out"
        boards = ("tensorboard", "wandb", "wandb_project")
        for name in ("ranks", *(f"telemetry.{board}" for board in boards)):
            yield name, False, reason
        yield "compress.bits", bound != "max_params", reason


def _of_factors(settings: Settings) -> Iterator[tuple[str, bool, str]]:
    """As `read_if`: the knobs of a factorization, and of measuring for it."""
    task, is_bare = settings.task, settings.is_of_bare_table
    if task not in ("train", "experiment", "factorize"):
        return
    method, given = settings.factorize.method, settings.factorize.statistics
    needing = [name for name, one in METHODS.items() if one.needs_statistics]
    is_made = task != "train" or _needs_factors(settings)
    reason = "no table is factorized here: leave it out"
    for path in (path for path in KNOBS if path.startswith("factorize.")):
        yield path, is_made, reason
    reason = f"factorize.method is '{method}', which needs none: choose one of "
    yield "factorize.statistics", method in needing, reason + ", ".join(needing)
    is_measured = is_made and method in needing and not given
    is_measured &= not (task == "factorize" and is_bare)
    reason = "no statistics are measured here: leave it out"
    yield "compress.calibration_tokens", is_measured, reason
    if task != "factorize":  # The others are for training, too.
        return
    for path in _ONLY_MEASURING:
        yield path, is_measured, reason
    # The projector of TensorBoard counts and names the tokens of a run.
    is_shown = settings.telemetry.tensorboard and not is_bare
    yield "data.tokenizer", is_measured or is_shown, reason
    yield "data.cache_dir", is_measured or (is_shown and not given), reason
    for path in (path for path in KNOBS if path.startswith("model.")):
        yield path, not is_bare, "a table without its model does not read it"


def _needs_factors(settings: Settings) -> bool:
    """Whether a single run needs a factorization of D before."""
    return ARMS[settings.arm].needs_factors(settings.factorize.bands > 1)
