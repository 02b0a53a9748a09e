"""The tokens that a run's model knows, and whether those of a corpus are the same."""

import dataclasses
import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from pcagpt.config.schema import DataSettings
from pcagpt.data import gguf_header, lost_tokenizer, vocabulary
from pcagpt.data.characters import CharacterTokenizer
from pcagpt.data.corpus import Corpus
from pcagpt.data.meta import CorpusInfo
from pcagpt.data.sources import TextSource, find_source
from pcagpt.data.token_array import pieces
from pcagpt.data.tokenizer import RANKS, how_to_name_tokens
from pcagpt.errors import UserError
from pcagpt.run import generation_files


def sha256_of_texts(texts: Collection[str]) -> str:
    """The hash of characters in pcagpt.json of an export; meta files state another."""
    return hashlib.sha256(repr(list(texts)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class OwnTokens:
    """What `record`, the run's config.json, says of its tokens.

    opened_sha256: hash of the tokenizer with which the run was opened, if that counts.
    """

    folder: Path
    record: dict[str, Any]
    opened_sha256: str | None = None

    def with_tokenizer(self, asked: DataSettings) -> DataSettings:
        """`asked`; a text gets the model's tokenizer if no other is asked for."""
        name = self.record.get("tokenizer")
        if not (
            asked.source and asked.tokenizer == "auto" and vocabulary.is_known(name)
        ):
            return asked
        is_text = isinstance(find_source(asked.source), TextSource)
        return dataclasses.replace(asked, tokenizer=name) if is_text else asked

    def ends(self, tokenizer: vocabulary.Tokenizer | CharacterTokenizer) -> list[int]:
        """As `generation_files.ends`, with the run's own tokenizer."""
        return generation_files.ends(self.record, tokenizer.eot_token)

    @property
    def encodes_as(self) -> str | None:
        """The tokenizer that a model of another program needs tokens of.

        None if it is unknown or gone, and for a run of ours: it was trained on tokens.
        """
        name = self.record.get("tokenizer")
        is_open = "data" not in self.record and vocabulary.is_known(name)
        return name if is_open else None

    def tokenizer_name(self, asked: str) -> str | None:
        """The name of the run's tokenizer, or of the one that was asked for.

        None if the run has none, or characters, and 'auto' was asked for. Raises
        UserError for another tokenizer than the run's own, or one with too many tokens.
        """
        name, texts = (self.record.get(field) for field in ("tokenizer", "characters"))
        if asked != "auto":
            self.check_unedited(vocabulary.name_of(asked))
        if asked != "auto" and (texts or (name and not self.has_tokenizer(asked))):
            own = name or f"its own {len(texts)} characters"
            raise UserError(
                f"data.tokenizer is '{asked}', but {self.folder} was trained on tokens "
                f"of {own}: leave it out"
            )
        if texts or (asked == "auto" and not name):
            return None
        if asked == "auto" and not vocabulary.is_known(name):
            raise UserError(
                f"{name}, the tokenizer of {self.folder}, is gone: restore it, or name "
                "the file as --config.data.tokenizer"
            )
        chosen = vocabulary.name_of(name if asked == "auto" else asked)
        described, opened = vocabulary.describe(chosen), self.opened_sha256
        is_other = opened not in (None, described.sha256)
        if is_other or (name and not self.has_tokenizer(chosen)):
            raise self._edited(chosen)
        self._compare(chosen)
        size, rows = described.rows_needed, self.record["vocab_size"]
        if rows < size:
            raise UserError(
                f"data.tokenizer: {chosen} has {size} tokens, the model of "
                f"{self.folder} {rows}: {how_to_name_tokens(rows)}"
            )
        return chosen

    def told_by(self, corpus: CorpusInfo, asked: str) -> dict[str, Any]:
        """Fields for a record that does not tell the text of its tokens.

        They are 'tokenizer' or 'characters', and 'tokenizer_sha256'; {} if the record
        has them or nothing tells them. The tokenizer that was asked for tells them, and
        the corpus, except of a run: the ids of its own corpus may be others. Raises as
        `tokenizer_name` does.
        """
        if any(self.record.get(name) for name in ("tokenizer", "characters")):
            return {}
        name, tells = self.tokenizer_name(asked), "data" not in self.record
        if tells and not corpus.is_assumed:
            name = name or corpus.tokenizer
        if name:
            sha256 = vocabulary.describe(name).sha256
            return {"tokenizer": name, "tokenizer_sha256": sha256}
        if tells and (texts := corpus.characters):
            sha256 = corpus.tokenizer_sha256
            return {"characters": list(texts), "tokenizer_sha256": sha256}
        return {}

    def has_tokenizer(self, name: str) -> bool:
        """Whether the run's own tokenizer is the one with this name.

        Its file may have been moved or changed: the record has its hash, too.
        """
        own, recorded = self.record.get("tokenizer"), self._sha256
        is_packaged = name in RANKS and own == name
        if recorded and not is_packaged and vocabulary.is_known(name):
            return vocabulary.describe(name).sha256 == recorded
        return vocabulary.are_same(own, name)

    def _compare(self, name: str, characters: tuple[str, ...] | None = None) -> None:
        """Compares what was named with what is left of the model's own tokenizer."""
        if self._is_told:
            return
        made, places = self.record.get("compressed"), [self.folder]
        if isinstance(made, dict):  # The files are beside the model it was made of.
            named = filter(None, map(made.get, ("run", "run_from_here")))
            places += [self.folder / str(path) for path in named]
        for place in {path.resolve(): path for path in places}.values():
            lost_tokenizer.check_is_models(place, name, characters)

    def check_unedited(self, name: str | None) -> None:
        """Raises UserError if the file of this name is the run's, but was changed."""
        is_own = bool(name) and name == self.record.get("tokenizer")
        if is_own and vocabulary.is_known(name) and not self.has_tokenizer(name):
            raise self._edited(name)

    def _edited(self, name: str) -> UserError:
        return UserError(
            f"{name} is another tokenizer now than the one of {self.folder}: restore "
            "it, or name the file of the old one as --config.data.tokenizer"
        )

    def may_share(self, other: Self) -> bool:
        """Whether the ids of two runs may mean the same text, as far as it is known."""
        name = self.record.get("tokenizer")
        if name in RANKS and name == other.record.get("tokenizer"):
            return True
        texts = [tuple(one.record.get("characters") or ()) for one in (self, other)]
        if all(texts):
            return texts[0] == texts[1]
        own, others = self._hashes, other._hashes
        return not (own and others) or bool(own & others)

    @property
    def _sha256(self) -> str | None:
        """The recorded hash of the run's tokenizer; one of the package has its own."""
        of_corpus, name = self.record.get("corpus") or {}, self.record.get("tokenizer")
        stated = self.record.get("tokenizer_sha256") or of_corpus.get(
            "tokenizer_sha256"
        )
        return stated or (RANKS[name].sha256 if name in RANKS else None)

    @property
    def _hashes(self) -> set[str]:
        """The recorded hash, and that of the characters as exports state it."""
        texts = self.record.get("characters")
        return {
            *filter(None, [self._sha256]),
            *([sha256_of_texts(texts)] if texts else []),
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What `check` reads of the record: JSON values, for factors of the model."""
        names = ("vocab_size", "tokenizer", "characters")
        own = {name: self.record.get(name) for name in names}
        return own | {"tokenizer_sha256": self._sha256}

    def check(self, corpus: CorpusInfo) -> None:
        """Raises UserError if the corpus has unknown ids, or another tokenizer.

        Two names are compared as such, otherwise the texts of the ids, or hashes.
        """
        own = self.record.get("tokenizer")
        self.check_unedited(corpus.tokenizer)
        if own and corpus.tokenizer and not self.has_tokenizer(corpus.tokenizer):
            raise UserError(
                f"{corpus.name} has tokens of {corpus.tokenizer}, but the model of "
                f"{self.folder} knows those of {own}: set "
                f"--config.data.tokenizer={own}, and give the text itself, instead of "
                "tokens, as --config.data.source"
            )
        known_ids = self.record["vocab_size"]
        if corpus.vocab_size > known_ids and not self._may_fit(corpus):
            if corpus.is_assumed:
                raise UserError(
                    f"{corpus.name} has no meta file, so that its ids are taken for "
                    f"{corpus.tokenizer}'s, but the model of {self.folder} knows "
                    f"{known_ids} tokens: put the meta.json or meta.pkl there that "
                    "tells the ids"
                )
            raise UserError(
                f"{corpus.name} has token ids up to {corpus.vocab_size - 1}, but the "
                f"model of {self.folder} knows {known_ids} tokens: give the corpus "
                "that it was trained on"
            )
        if own and corpus.tokenizer:
            return
        texts = self.record.get("characters"), corpus.characters
        if None not in texts:
            is_same = tuple(texts[0]) == tuple(texts[1])
        else:
            stated = {
                "characters": corpus.characters,
                "tokenizer_sha256": corpus.tokenizer_sha256,
            }
            other = dataclasses.replace(self, record=stated)._hashes
            is_same = not (self._hashes and other) or bool(self._hashes & other)
        if not is_same:
            raise self.other_numbering(corpus)

    def _may_fit(self, corpus: CorpusInfo) -> bool:
        """Whether only added tokens of its tokenizer can be ids without a row."""
        is_known = self.record.get("tokenizer") or self._sha256
        if not (is_known and corpus.tokenizer):
            return False
        least = vocabulary.describe(corpus.tokenizer).rows_needed
        return least <= self.record["vocab_size"]

    def within_rows(self, corpus: Corpus, splits: Collection[str]) -> Corpus:
        """The corpus, without added tokens that the table has no row for.

        UserError if a split has such a token.
        """
        rows = self.record["vocab_size"]
        if corpus.vocab_size <= rows:
            return corpus
        for split in splits:
            highest = max(int(ids.max()) for ids in pieces(corpus.tokens(split)))
            if highest >= rows:
                raise UserError(
                    f"the {split} split of {corpus.name} has the added token with id "
                    f"{highest}, but {self.folder} knows {rows} tokens: remove it from "
                    "the text"
                )
        return dataclasses.replace(corpus, vocab_size=rows)

    def other_numbering(self, corpus: CorpusInfo) -> UserError:
        """The error of a corpus whose ids stand for other text."""
        return UserError(
            f"{corpus.name} numbers its tokens in another way than the corpus of "
            f"{self.folder}: its ids mean other text to the model; make them with "
            "the run's own meta file"
        )

    @property
    def _is_told(self) -> bool:
        known = ("data", "tokenizer", "characters", "tokenizer_sha256")
        return any(self.record.get(name) for name in known)

    def check_is_told_beside(self, other: Self, asked: str) -> None:
        """Raises UserError if only `other`, another model, tells its tokens.

        A tokenizer that was asked for is that of both.
        """
        if self._is_told or asked != "auto":
            return
        if other._sha256 or other.record.get("characters"):
            name = other.record.get("tokenizer")
            option = f"set --config.data.tokenizer={name}, or " if name else ""
            raise UserError(
                f"{self.folder} has no tokenizer, and {other.folder} has one: if both "
                f"have the same, {option}put its tokenizer.json, or nanoGPT's "
                "meta.pkl, there"
            )

    def check_is_told(self, corpus: CorpusInfo, asked: str) -> None:
        """Raises UserError if nothing says that tokens are those of the model."""
        if self._is_told:
            return
        if asked != "auto":
            self._compare(vocabulary.name_of(asked))
            return
        if corpus.characters:
            self._compare(corpus.name, corpus.characters)
        if corpus.tokenizer:
            if self.folder.suffix == gguf_header.ENDING and self.folder.is_file():
                vocabulary.load(str(self.folder))  # Says why it was not taken.
            is_model = "model" in self.record  # Factors are not.
            remedy = "put the model's tokenizer.json there, " if is_model else ""
            size = vocabulary.describe(corpus.tokenizer).rows_needed
            rows = self.record["vocab_size"]
            if size > rows:
                has = "is taken to have" if corpus.is_assumed else "has"
                raise UserError(
                    f"{self.folder} has no tokenizer, and its {rows:,} rows are too "
                    f"few for the {size:,} tokens of {corpus.tokenizer}, which "
                    f"{corpus.name} {has}: {remedy}set --config.data.tokenizer=FILE, "
                    "or give token files of the model with a meta.json of "
                    f'{{"vocab_size": {rows}}}'
                )
            remedy += "or, " if remedy else ""
            raise UserError(
                f"{self.folder} has no tokenizer, and {corpus.name} has tokens of "
                f"{corpus.tokenizer}: {remedy}if these are its tokens, set "
                f"--config.data.tokenizer={corpus.tokenizer}"
            )
