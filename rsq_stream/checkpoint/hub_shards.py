"""Have a hub model's shards here while a run needs them, and no longer.

With ``--evict-source`` a shard is fetched ahead of need, one at a time, and removed
from the hub's cache after the last block that needs it: of a large model only a few
shards are on disk at once. What was in the cache before the run stays there. A shard
that damage makes necessary once more is simply fetched again.
"""

import json
from collections.abc import Callable, Collection
from contextlib import suppress
from threading import Thread

from rsq_stream.checkpoint.files import HubFiles
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.checkpoint.source_identity import SourceIdentity
from rsq_stream.config.run_options import RunOptions
from rsq_stream.errors import UsageError
from rsq_stream.model.architecture import Architecture, read_architecture
from rsq_stream.model.tensor_names import EMBEDDING, FINAL_NORM, LM_HEAD, block_prefix
from rsq_stream.storage.journal import Journal

NO_BLOCK = -1
"""Stands for a block: what lies outside of them, and is read first."""
_FETCHED = "fetched"
"""The journal's fact: which shards the run fetched, so that it may remove them."""


def require_hub(checkpoint: Checkpoint) -> HubFiles:
    """Return the hub's files; those of a folder are never removed.

    Raises
    ------
    UsageError
        The checkpoint is a folder.
    """
    if not isinstance(checkpoint.files, HubFiles):
        raise UsageError(
            f"--evict-source: {checkpoint.files.where} is a folder, from which nothing"
            " is ever removed; give a hub id, or leave the option out"
        )
    return checkpoint.files


class ShardSchedule:
    """Which shards each block needs."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture) -> None:
        head = () if architecture.tied else (LM_HEAD,)
        names = [[EMBEDDING, FINAL_NORM, *head]] + [
            [block_prefix(block) + name for name in architecture.block_shapes(block)]
            for block in range(architecture.blocks)
        ]
        self._checkpoint = checkpoint
        self._by_block = [
            list(dict.fromkeys(checkpoint.entry(name).shard for name in block))
            for block in names
        ]
        self.last = {
            shard: block
            for block, shards in enumerate(self._by_block, start=NO_BLOCK)
            for shard in shards
        }
        """The last block that needs a shard."""

    def of(self, block: int) -> list[str]:
        """Return the shards of a block; none after the last."""
        return self.from_block(block, block + 1)

    def from_block(self, block: int, end: int | None = None) -> list[str]:
        """Return the shards of a block and of those after it, in order of need."""
        stop = None if end is None else end - NO_BLOCK
        blocks = self._by_block[block - NO_BLOCK : stop]
        return list(dict.fromkeys(shard for shards in blocks for shard in shards))

    def most_bytes(self, absent: Collection[str] | None = None) -> int:
        """Return what lies on disk at most: a block's shards and the one after them.

        With ``absent``, of these shards alone: the others lie there all the time.
        """
        sizes = self._sizes(absent)
        here: set[str] = set()
        most = 0
        for block in range(NO_BLOCK, len(self._by_block) + NO_BLOCK):
            here = {shard for shard in here if self.last[shard] >= block}
            here.update(self.of(block))
            ahead = (s for s in self.from_block(block + 1) if s not in here)
            here.update([*ahead][:1])
            most = max(most, sum(sizes[shard] for shard in here))
        return most

    def all_bytes(self, absent: Collection[str]) -> int:
        """Return what these shards take in all."""
        return sum(self._sizes(absent).values())

    def _sizes(self, counted: Collection[str] | None) -> dict[str, int]:
        """Return the bytes of each shard that is needed; of those not counted, none."""
        sizes = dict.fromkeys(self.last, 0)
        for entry in self._checkpoint.tensors.values():
            if entry.shard in sizes and (counted is None or entry.shard in counted):
                sizes[entry.shard] += entry.size_bytes
        return sizes


def bytes_to_fetch(checkpoint: Checkpoint, options: RunOptions) -> int:
    """Return by how much a run lets the hub's cache grow at most; none for a folder.

    What it fetched before it was stopped counts as there, although it may go.
    """
    files = checkpoint.files
    if not isinstance(files, HubFiles):
        return 0
    needs = ShardSchedule(checkpoint, read_architecture(checkpoint.config, files.where))
    absent = {shard for shard in needs.last if not files.cached(shard)}
    if options.evict_source:
        return needs.most_bytes(absent)
    return needs.all_bytes(absent)


class AllShardsStay:
    """Stands for a ``ShardFetcher`` where all shards stay once they are here."""

    def advance_to(self, block: int) -> None:
        """Do nothing: a shard is fetched when it is read."""


def shard_fetcher_for(
    options: RunOptions,
    checkpoint: Checkpoint,
    *,
    architecture: Architecture,
    identity: SourceIdentity,
    journal: Journal,
    check: Callable[[], None],
) -> "ShardFetcher | AllShardsStay":
    """Return what a run calls before it reads a block, and once after the last.

    Raises
    ------
    UsageError
        With ``evict_source``: the checkpoint is a folder, or its hub tells no hashes.
    """
    if not options.evict_source:
        return AllShardsStay()
    files = require_hub(checkpoint)
    for name, sha256 in identity.shards().items():
        if not sha256:  # known only once the whole of it was read
            raise UsageError(
                f"--evict-source: the hub does not tell the sha256 of {name}, so all"
                " shards have to stay; leave the option out"
            )
    return ShardFetcher(files, ShardSchedule(checkpoint, architecture), journal, check)


class ShardFetcher:
    """Fetches and removes the shards of a hub model as a run moves on."""

    def __init__(
        self,
        files: HubFiles,
        needs: ShardSchedule,
        journal: Journal,
        check: Callable[[], None],
    ) -> None:
        """Go on with what an earlier part of the run fetched; ``check`` may stop."""
        self._files = files
        self._needs = needs
        self._journal = journal
        self._check = check
        self._fetched: set[str] = set(json.loads(journal.get(_FETCHED) or "[]"))
        self._ahead: tuple[str, Thread] | None = None

    def advance_to(self, block: int) -> None:
        """Remove what no block from this one on needs, and have this one's shards here.

        The next one that is not here is fetched behind; after the last block, nothing.
        """
        for shard in sorted(self._fetched):
            if self._needs.last.get(shard, block) < block:
                self._files.evict(shard)
        for shard in self._needs.of(block):
            self._wait_for(shard)
            self._note(shard)
            self._files.path(shard)
        if self._ahead is not None and self._ahead[1].is_alive():
            return
        for shard in self._needs.from_block(block + 1):
            if not self._files.cached(shard):
                self._note(shard)
                # No pool's: a download cannot be stopped, and must not hold up the end.
                thread = Thread(target=self._fetch, args=(shard,), daemon=True)
                self._ahead = shard, thread
                thread.start()
                return

    def _note(self, shard: str) -> None:
        """Before a shard is fetched: it is the run's own, after a kill too."""
        if shard not in self._fetched and not self._files.cached(shard):
            self._fetched.add(shard)
            self._journal.put({_FETCHED: json.dumps(sorted(self._fetched))})

    def _fetch(self, shard: str) -> None:
        # Whoever needs it asks again, and says then what is wrong.
        with suppress(Exception):
            self._files.path(shard)

    def _wait_for(self, shard: str) -> None:
        if self._ahead is not None and self._ahead[0] == shard:
            while self._ahead[1].is_alive():
                self._check()
                self._ahead[1].join(0.2)
