"""Everything a run trains with, built from its settings and its corpus."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from pcagpt import trees
from pcagpt.config import Settings
from pcagpt.data.batches import TrainingBatches
from pcagpt.data.corpus import Corpus
from pcagpt.errors import UserError, warn_once
from pcagpt.model import GPT, order_constants
from pcagpt.run import generation_files, initialise
from pcagpt.run.build import build_config
from pcagpt.run.evaluator import Evaluator
from pcagpt.run.trained import Run
from pcagpt.sharding import placement, processes
from pcagpt.training import optim


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a training run that do not change while it trains.

    settings: with the sizes and ranks of imported bands; imported_sha256: the hashes of
    all imports; generation: that of the record of the run that it starts from, None
    without one. The imports themselves are read again when the run begins: the setups
    of all jobs are made before the first job runs, and together would fill the memory.
    """

    settings: Settings
    corpus: Corpus
    mesh: jax.sharding.Mesh
    model: GPT
    optimizer: optim.Optimizer
    batches: TrainingBatches
    validation: Evaluator
    imported_sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    generation: dict[str, Any] | None = None

    @classmethod
    def of(
        cls, settings: Settings, corpus: Corpus, missing: Collection[str] = ()
    ) -> "Setup":
        """Builds the setup; checks all that can be checked before the first file.

        The imports in `missing` do not exist yet. The setup then omits them and serves
        only as a check. All processes must call this.

        Raises UserError if the settings do not fit the corpus, the imports or the
        devices.
        """
        frozen = initialise.frozen_patterns(settings.init)
        if missing:  # A control needs all imports.
            without = {"init.keep": "all", **dict.fromkeys(missing, "")}
            settings = settings.replace(without)
        settings, _ = initialise.with_bands(settings)
        if settings.model.band_blocks:
            source = settings.init.weights_from
            subject = f"{source} has" if source else "model.band_blocks asks for"
            raise UserError(
                f"{subject} a packed table, which cannot be trained: name a model with "
                "factors or with a coded table, such as compressed/best_k128"
            )
        train = settings.train
        mesh = placement.make_mesh(settings.mesh.data, settings.mesh.fsdp)
        placement.check_splits(settings.model.n_embd, mesh)
        placement.check_divisible(
            "train.batch_size / train.accumulation",
            train.batch_size // train.accumulation,
            mesh,
        )
        init, start, kept = settings.init, None, None
        if source := initialise.start_of(settings):
            start = Run.open(source)
            start.tokens.check_is_told(corpus, settings.data.tokenizer)
            start.check_corpus(corpus, settings.data.source)
            kept = start.record.get(generation_files.FIELD)
        # Only a warning: controls may mix models.
        mixed = processes.from_first(lambda: initialise.mixed_origins(settings.init))
        if mixed and jax.process_index() == 0:
            warn_once(mixed)
        model = GPT(build_config(settings.model, corpus.vocab_size))
        setup = cls(
            settings=settings,
            corpus=corpus,
            mesh=mesh,
            model=model,
            optimizer=optim.optimizer(train, frozen),
            batches=TrainingBatches(
                corpus.tokens("train"),
                model.config.block_size,
                train.batch_size,
                settings.seed,
            ),
            validation=Evaluator(
                model,
                mesh,
                corpus,
                "val",
                settings.evaluate.batch_size,
                train.loss_chunks,
            ),
        )
        setup.import_into(_stand_in(model))
        asked = settings.data.tokenizer
        processes.from_first(lambda: initialise.check_tokens(init, corpus, asked))
        setup.open_teacher()
        hashes = initialise.import_hashes(settings)
        if start:  # What was kept of it belongs to the weights of these hashes.
            start.check_unchanged()
        return dataclasses.replace(setup, imported_sha256=hashes, generation=kept)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one update trains on, over all devices."""
        return self.settings.train.batch_size * self.model.config.block_size

    def batch(self, step: int) -> jax.Array:
        """The batch of a step on the devices, in A parts: int32 [A, B, T + 1]."""
        tokens_BT = self.batches.batch_at(step)
        parts = self.settings.train.accumulation
        tokens_ABT = tokens_BT.reshape(parts, -1, tokens_BT.shape[-1])
        return placement.put_batch(tokens_ABT, placement.part_sharding(self.mesh))

    def import_into(self, variables: dict) -> dict:
        """Replaces what is imported in `variables`; UserError if it does not fit."""
        init, config = self.settings.init, self.model.config
        if init.weights_from:
            return Run.open(init.weights_from).variables(config)
        _, table = initialise.with_bands(self.settings)
        params, seed = variables["params"], self.settings.seed
        imported = initialise.imported_weights(init, table, config, params, seed)
        found = {"params": trees.replace(params, imported, source="init")}
        if table and len(config.bands) > 1:
            found["constants"] = order_constants(table.order)
        return variables | found

    def open_teacher(self) -> tuple[GPT, dict] | None:
        """The model of `distill.teacher` and its variables, on the host.

        Raises UserError if it does not fit.
        """
        path, student = self.settings.distill.teacher, self.model.config
        if not path:
            return None
        run = Run.open(path)
        asked = self.settings.data.tokenizer
        run.tokens.check_is_told(self.corpus, asked)
        run.check_corpus(self.corpus, self.settings.data.source)
        init = self.settings.init
        runs = (init.weights_from or self.settings.model_path, init.blocks_from)
        starts = [Run.open(start).tokens for start in runs if start]
        # The corpus may not say what its ids mean.
        for start in starts + initialise.tokens_of_factors(init):
            run.tokens.check_is_told_beside(start, asked)
            if not run.tokens.may_share(start):
                raise UserError(
                    f"distill.teacher: {path} numbers its tokens in another way than "
                    f"{start.folder}: restore its tokenizer, or name another teacher"
                )
        config = run.config(self.settings.model)
        if config.vocab_size != student.vocab_size:
            raise UserError(
                f"distill.teacher: {path} has {config.vocab_size} tokens, but this "
                f"model has {student.vocab_size}: both must have the same number"
            )
        if config.block_size < student.block_size:
            raise UserError(
                f"distill.teacher: {path} reads {config.block_size} tokens at a time, "
                f"but this model reads {student.block_size}: lower model.block_size"
            )
        return GPT(config), run.variables(config)

    def check_unchanged(self) -> None:
        """Raises UserError if an import was changed since the setup was made."""
        for name, found in initialise.import_hashes(self.settings).items():
            if found != self.imported_sha256[name]:
                raise UserError(
                    f"stopped, because the import of {name} was changed since it was "
                    "checked: run the same command again"
                )


def _stand_in(model: GPT) -> Any:
    """Variables with the right shapes and without memory, to check imports with."""
    tokens_BT = jax.ShapeDtypeStruct((1, 1), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)
    return jax.tree.map(
        lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), shapes
    )
