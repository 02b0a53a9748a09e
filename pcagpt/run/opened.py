"""A trained run as a model: what it was built as, its weights, the tokens it knows."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from pcagpt import trees
from pcagpt.config import KNOBS, Hardware, model_settings
from pcagpt.data.corpus import Corpus
from pcagpt.errors import UserError
from pcagpt.model import GPT, GPTConfig
from pcagpt.run import checkpoint
from pcagpt.run import folder as run_folder

# Knobs of the model that are about the device, and change no more than rounding.
DEVICE_CHOICES = ("compute_dtype", "attention", "kernels")


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """One checkpoint of a run.

    record: the run's config.json. It and the checkpoint's weights are all that is read:
    a folder that holds these need not have been trained.
    """

    run_dir: Path
    step: int
    record: dict

    @classmethod
    def find(cls, path: str | Path) -> "TrainedRun":
        """The newest checkpoint of RUN, or that of RUN/ckpt/STEP.

        Raises:
          UserError: no such folder, no checkpoint in it, or no config.json.
        """
        run_dir, step = checkpoint.find(path)
        record = run_folder.read_config(run_dir)
        if record is None or not {"model", "vocab_size"} <= record.keys():
            problem = "has no" if record is None else "has no model in its"
            raise UserError(
                f"{run_dir} {problem} config.json: it is not a run's folder"
            )
        return cls(run_dir, step, record)

    def model_section(self, asked: ConfigDict, free: Collection[str]) -> ConfigDict:
        """The `model` section that rebuilds it; the knobs in `free` are as asked."""
        section = asked.copy_and_resolve_references()
        with section.ignore_type():
            for name in section:
                if name not in free:
                    section[name] = self._knob(name)
        return section

    def check_model(self, asked: ConfigDict, free: Collection[str]) -> None:
        """Raises UserError for a knob that was set, is not free and contradicts it."""
        for name, value in asked.items():
            if name in free or value in (
                KNOBS[f"model.{name}"].default,
                self._knob(name),
            ):
                continue
            raise UserError(
                f"model.{name} is {value}, but {self.run_dir} was trained with "
                f"{self._knob(name)}: leave it out, a run keeps its model"
            )

    def _knob(self, name: str) -> Any:
        """What a knob of the model was; a knob younger than the run, its default."""
        if name == "vocab_size":
            return self.record["vocab_size"]
        value = self.record["model"].get(name, KNOBS[f"model.{name}"].default)
        return tuple(value) if isinstance(value, list) else value

    def check_corpus(self, corpus: Corpus) -> None:
        """Raises UserError if the corpus has ids it lacks, or another tokenizer."""
        known_ids = self.record["vocab_size"]
        if corpus.vocab_size > known_ids:
            raise UserError(
                f"{corpus.name} has token ids up to {corpus.vocab_size - 1}, the model "
                f"of {self.run_dir} {known_ids} tokens: give the corpus it was trained "
                "on"
            )
        known = self.record.get("tokenizer")
        if known and corpus.tokenizer and known != corpus.tokenizer:
            raise UserError(
                f"{corpus.name} is in tokens of {corpus.tokenizer}, the model of "
                f"{self.run_dir} knows those of {known}: set "
                f"--config.data.tokenizer={known}"
            )

    def config(self, asked: ConfigDict, hardware: Hardware) -> GPTConfig:
        """What it is built as on this device: of `asked`, only that is heeded."""
        section = self.model_section(asked, DEVICE_CHOICES)
        return GPTConfig(**model_settings(section, self.record["vocab_size"], hardware))

    def variables(self, config: GPTConfig) -> dict:
        """{'params', 'constants'} for a model of this config, as host arrays.

        Raises:
          UserError: the checkpoint is damaged, or is that of another model.
        """
        path = self.run_dir / checkpoint.FOLDER / str(self.step)
        params, constants, _ = checkpoint.load_weights(path)
        found = trees.flatten({"params": params, "constants": constants})
        tokens_BT = jax.ShapeDtypeStruct((1, 1), "int32")
        wanted = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens_BT)
        missing = [name for name in trees.flatten(wanted) if name not in found]
        if missing:
            raise UserError(
                f"{path} lacks '{missing[0]}', which the model of its config.json has"
            )
        return {"constants": {}} | trees.replace(wanted, found, source=str(path))
