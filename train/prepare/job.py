"""What is prepared: the same for every worker, on every machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from plait.configs import codec
from plait.configs.components import Config
from plait.configs.domains import Whole
from plait.configs.files import write_atomically
from plait.data.config import DataConfig
from plait.data.shards.learning import tokenizer_for
from plait.data.shards.pieces import Piece, cut
from plait.data.shards.prepared import TOKENIZER
from plait.data.shards.shard import name_of, read_shard
from plait.data.sources.source import open_source
from plait.data.tokenizers.files import load_tokenizer, read_meta
from plait.data.tokenizers.tokenizer import Tokenizer
from plait.train.run_folder.contents import RunError
from plait.train.run_folder.owner import last_owner

JOB, CLAIMS = "job.json", "claims"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Config):
    """What job.json holds."""

    data: DataConfig
    """Source, fields and tokenizer; the rest is at its defaults."""
    shard_mib: Annotated[int, Whole(1, 1 << 20)]
    """MiB of files that a shard is made of, about."""

    @staticmethod
    def of(data: DataConfig, shard_mib: int) -> Job:
        """The job of preparing what `data` reads."""
        names = ("source", "text_field", "prompt_field", "tokenizer", "vocab_size")
        return Job(data=DataConfig(**{name: getattr(data, name) for name in names}), shard_mib=shard_mib)

    def begin(self, folder: Path) -> None:
        """Writes job.json. Raises RunError where another job is prepared in the folder."""
        if folder.exists() and not folder.is_dir():
            raise RunError(f"out={str(folder)!r} is a file; give a folder")
        if (folder / JOB).exists():
            if changed := codec.differences(codec.encode(codec.load(Job, folder / JOB)), codec.encode(self)):
                raise RunError(
                    f"out={str(folder)!r} prepares something else: {'; '.join(changed)}; use the same options, or another --out"
                )
            return
        if folder.exists() and any(path for path in folder.iterdir() if not path.name.startswith(".")):
            raise RunError(f"out={str(folder)!r} has other files; give a new folder")
        write_atomically(folder / JOB, json.dumps(codec.encode(self), indent=1) + "\n")

    def pieces(self, tokenizer: Tokenizer) -> list[Piece]:
        """What the shards are made of, in order. Raises DataError where the source cannot be looked at."""
        data = self.data
        source = open_source(data.source, data.text_field, data.prompt_field)
        return cut(source, self.shard_mib << 20, tokenizer.fingerprint)

    def make_tokenizer(self, folder: Path) -> None:
        """Makes the tokenizer that the folder lacks. Raises DataError where it cannot be made."""
        if read_meta(folder / TOKENIZER) is None:
            data = self.data
            tokenizer = tokenizer_for(data, open_source(data.source, data.text_field, data.prompt_field), self.shard_mib << 20)
            tokenizer.save(folder / TOKENIZER, tokenizer=data.tokenizer, vocab_size=data.size_to_learn)


def read_job(folder: Path) -> tuple[Job, Tokenizer, list[Piece]]:
    """The job of a folder, its tokenizer and the pieces."""
    job, tokenizer = codec.load(Job, folder / JOB), load_tokenizer(folder / TOKENIZER)
    return job, tokenizer, job.pieces(tokenizer)


def is_made(folder: Path, number: int, piece: Piece) -> bool:
    """Whether the shard of a piece is there."""
    meta = read_shard(folder / name_of(number))
    return meta is not None and meta.piece == piece.key


def claim(folder: Path, what: str) -> Path:
    """The folder to be owned by who makes a shard, or the tokenizer."""
    return folder / CLAIMS / what


def is_held(folder: Path, number: int) -> bool:
    """Whether a worker has a shard, as far as that is known here without waiting."""
    found = last_owner(claim(folder, name_of(number)))
    return found is not None and not found.left and not found.dead
