"""The layer loop: embed → (MHA, FFN) × n → norm → head."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import embedding, linear

from mhaffn import ops
from mhaffn.config import KINDS, Sublayer, format_bytes
from mhaffn.device import open_device
from mhaffn.errors import ConfigError, StreamError
from mhaffn.image import Image
from mhaffn.memory import load_residents
from mhaffn.modules import FFN, MHA, Block, Context, Provider
from mhaffn.plan import Plan
from mhaffn.reader import ArenaInfo, Direct, Engine, PinnedArena, Reader, ReaderInfo
from mhaffn.sizes import Sizes
from mhaffn.store import Store
from mhaffn.stream import Stream
from mhaffn.trace import Phase, Trace

GUESSES_MAX = 63
"""Tokens after the one due that a pass of decode may hold: they were guessed, and it tells which of them were right."""


class Runner:
    """A model whose sublayers come from a stream. One pass at a time; close it when done.

    Attributes: ``config``, ``store``, ``plan``, ``trace``, ``device`` and ``dtype``.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        *,
        device: torch.device,
        engine: Engine = "auto",
        direct: Direct = "auto",
        strict: bool = False,
        verify: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.store, self.plan, self.config, self.trace = store, plan, store.config, Trace()
        self.dtype: torch.dtype = getattr(torch, store.dtype)
        self._sizes = Sizes(store.config, store.dtype, stored=store.stored())
        self._target = target = open_device(device, self.trace)
        self.device, self.copies = target.torch_device, target.copies
        self._lock = threading.Lock()
        images = {sublayer: Image(records) for sublayer, records in store.sublayers.items()}
        with Reader(engine=engine, direct=direct, strict=strict) as loader:
            self._residents = load_residents(
                store, plan, images, device=target, reader=loader, verify=verify, progress=progress
            )
        with ExitStack() as undo:
            undo.callback(self._residents.close)
            self._staging = PinnedArena(plan.staging_bytes) if plan.staging_bytes else None
            if self._staging is not None:
                undo.callback(self._staging.close)
            self._reader = Reader(engine=engine, direct=direct, strict=strict, arena=self._staging)
            undo.callback(self._reader.close)
            self._stream = Stream(
                plan, images, self._residents,
                device=target, reader=self._reader, staging=self._staging, trace=self.trace, verify=verify,
            )  # fmt: skip
            undo.pop_all()
        self.blocks = [self._block(layer) for layer in range(self.config.num_layers)]

    def _block(self, layer: int) -> Block:
        mha, ffn = (self.provider(Sublayer(layer, kind)) for kind in KINDS)
        return Block(MHA(self.config, layer, mha), FFN(self.config, ffn))

    def provider(self, sublayer: Sublayer) -> Provider:
        """What gives the weights of ``sublayer``; every pass asks for those of all, in order."""
        return partial(self._stream.weights, sublayer)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids ``[B, T]`` to hidden states ``[B, T, D]``."""
        return embedding(ids, self.resident["embedding"])

    def forward(self, x: torch.Tensor, context: Context, seen: int = 0) -> torch.Tensor:
        """One pass over all sublayers, after ``seen`` tokens: ``[B, T, D]`` to normalised hidden states ``[B, T, D]``.

        Raises what the stream raises, and :class:`StreamError` while another pass runs.
        """
        with self.one_pass(x.shape[0], x.shape[1], seen):
            for block in self.blocks:
                x = block(x, context)
        return ops.rms_norm(x, self.resident["norm"], self.config.norm_eps)

    @contextmanager
    def one_pass(self, batch: int, new: int, seen: int) -> Iterator[None]:
        """Marks one pass of ``batch`` sequences of ``new`` tokens each, after ``seen``.

        A few tokens after others are decode: guesses come with the last one. Raises :class:`StreamError` while
        another pass runs.
        """
        phase: Phase = "decode" if new == 1 or (seen and new <= GUESSES_MAX + 1) else "prefill"
        with self._one_at_a_time(), self.trace.one_pass(phase, batch * new):
            yield

    def check_room(self, batch: int, seen: int, new: int) -> None:
        """Raises :class:`ConfigError` unless ``batch`` sequences, ``seen`` positions long, have room for ``new``."""
        work, total = self.plan.work, seen + new
        if new == 0:
            raise ConfigError("got no tokens, expected at least one")
        if total > work.context:
            raise ConfigError(
                f"got a sequence of {total} tokens, expected at most {work.context}, the context this model was "
                f"loaded with. Load it with context={total} or more; the model itself knows "
                f"{self.config.max_position_embeddings} positions."
            )
        if batch * total > work.batch * work.context:
            raise ConfigError(
                f"got {batch} sequences of {total} tokens, expected at most {work.batch * work.context} tokens in "
                f"all: batch={work.batch} times context={work.context}. Load the model with a larger batch, at most "
                f"batch={batch}; each beam is a sequence."
            )
        if batch * new > work.batch * work.tokens:
            raise ConfigError(
                f"got {batch} sequences of {new} tokens in a pass, expected at most {work.batch * work.tokens} tokens "
                f"in all: batch={work.batch} times tokens={work.tokens}. Load the model with tokens={new} or more, or "
                "let generate(prefill_chunk_size=...) give the prompt in parts."
            )
        if batch > work.batch:
            one_pass = replace(work, batch=batch, tokens=new, logits=min(new, work.logits))
            needed = self._sizes.activations(one_pass)
            if needed > (planned := self._sizes.activations(work)):
                raise ConfigError(
                    f"got {batch} sequences of {new} tokens in a pass, whose states and logits take "
                    f"{format_bytes(needed)}, expected at most {format_bytes(planned)}: what batch={work.batch} of "
                    f"tokens={work.tokens} take. Load the model with a larger batch, at most batch={batch}."
                )

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise StreamError("another pass is running on this model; a streamed model runs one at a time")
        try:
            yield
        finally:
            self._lock.release()

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[B, T, D]`` to logits ``[B, T, vocabulary]``."""
        head = self.resident["embedding" if self.config.tie_word_embeddings else "head"]
        rows = x.reshape(-1, x.shape[-1])  # of the slices of a batch torch makes products with a copy of the head each
        return linear(rows, head).view(*x.shape[:-1], head.shape[0])

    def sweep(self) -> None:
        """One pass over all weights without compute: what the links alone take."""
        with self._one_at_a_time(), self.trace.one_pass("sweep", 0):
            for sublayer in self.plan.tiers:
                self._stream.acquire(sublayer)
                self._stream.release(sublayer)
            self._target.settle()

    @property
    def resident(self) -> dict[str, torch.Tensor]:
        """``embedding``, ``norm`` and, unless tied, ``head``; raises :class:`StreamError` once closed."""
        if not self._residents.tensors:
            raise StreamError("the model is closed; load it again")
        return self._residents.tensors

    def reader_info(self) -> ReaderInfo:
        """The engine and mode that really read, and why."""
        return self._reader.info()

    def staging_info(self) -> ArenaInfo | None:
        """The staging memory and the most of it that was in use at once; None where nothing is read."""
        return self._staging.info() if self._staging is not None else None

    def close(self) -> None:
        """Ends all transfers and frees all memory; may be called more than once."""
        self._stream.close()
