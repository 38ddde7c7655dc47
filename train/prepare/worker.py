"""A worker: one process that makes one shard after another until none is left that nobody has. It tells its progress in JSON lines."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path

from plait.data.config import DataError
from plait.data.progress import heard
from plait.data.shards.pieces import Piece
from plait.data.shards.shard import make_shard, name_of
from plait.data.tokenizers.tokenizer import Tokenizer
from plait.train.prepare.job import claim, is_held, is_made, read_job
from plait.train.run_folder.owner import FolderInUse, FolderLost, owned


def work(folder: Path, number: int, count: int) -> None:
    """Makes shards. A piece that cannot be read is told, and left.

    Args:
        number: of this worker among the `count` on this machine, which begin at different pieces.
    """
    parent = os.getppid()
    _, tokenizer, pieces = read_job(folder)
    first = number * len(pieces) // count
    turns = [*range(first, len(pieces)), *range(first)]
    bad: set[int] = set()

    def told(num_tokens: int, num_bytes: int) -> None:
        if os.getppid() != parent:  # nobody hears this any more, or would end it
            os._exit(1)
        _tell({"tokens": num_tokens, "bytes": num_bytes})

    with heard(told):
        for patient in (False, True):  # what others seem to have is watched at the end, which takes its time
            for turn in turns:
                if turn in bad or is_made(folder, turn, pieces[turn]):
                    continue
                if patient or not is_held(folder, turn):
                    try:
                        _make(folder, turn, pieces[turn], tokenizer)
                    except DataError as error:
                        bad.add(turn)
                        _tell({"error": str(error)})


def _make(folder: Path, number: int, piece: Piece, tokenizer: Tokenizer) -> None:
    where = folder / name_of(number)
    with contextlib.suppress(FolderInUse, FolderLost), owned(claim(folder, name_of(number))):
        if is_made(folder, number, piece):
            return
        shutil.rmtree(where, ignore_errors=True)  # of another piece, or not whole
        make_shard(piece, tokenizer, where)


def _tell(what: dict[str, object]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
