"""What a model takes, in bytes: each sublayer, and what a run holds besides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from mhaffn.config import KINDS, Kind, ModelConfig, Sublayer, order
from mhaffn.formats import ITEM_BYTES, PLAIN, Format, Formats

PAGE = 4096
DEVICE_ALIGN = 256
SCRATCH_BYTES = 192 << 20
"""What products with weights in few bits hold besides, at most; of small models less."""
DEQUANTIZING_BYTES, ARRANGED_ROWS, PARTIAL_SUMS_BYTES = 16, 2048, 20 << 20
"""Of kernels, which know no sizes: what PyTorch holds of a weight that it dequantises, the rows of inputs that products
on sm_90 arrange at once, and room for the sums of their parts."""
CHUNK_TOKENS = 4096
"""Positions a sublayer works on at once: a longer prompt goes through its weights in several steps."""
CHOICE_BYTES = 56
"""What choosing the next token holds for each logit at most: in float32, sorted with places, summed up, masked."""


@dataclass(frozen=True)
class Workload:
    """What a run must have room for: ``batch`` sequences, each of ``tokens`` a pass and ``context`` in all at most.

    A pass gives the logits of ``logits`` tokens of a sequence.
    """

    tokens: int = 2048
    context: int = 4096
    batch: int = 1
    logits: int = 1


@dataclass(frozen=True)
class Sizes:
    """Bytes of each sublayer: its weights alone, and at most what they take as an image in memory.

    ``formats`` says which sublayers are in few bits; ``stored`` has each tensor's bytes, where a store tells.
    """

    config: ModelConfig
    dtype: str
    formats: Formats = field(default_factory=Formats)
    stored: Mapping[Sublayer, tuple[int, ...]] = field(default_factory=dict)

    def weights(self, sublayer: Sublayer) -> int:
        return sum(self.tensors(sublayer))

    def image(self, sublayer: Sublayer) -> int:
        """An upper bound of host and device images: every tensor by its aligned cover."""
        return sum(nbytes // PAGE * PAGE + 2 * PAGE for nbytes in self.tensors(sublayer))

    def resident(self) -> int:
        return sum(ITEM_BYTES[self.dtype] * math.prod(shape) for shape in self.config.resident_shapes().values())

    def kv_cache(self, work: Workload) -> int:
        c = self.config
        per_position = 2 * c.num_kv_heads * c.head_dim * ITEM_BYTES[self.dtype]
        return work.batch * work.context * c.num_layers * per_position

    def activations(self, work: Workload) -> int:
        """A bound of what one pass holds at once: hidden states of all tokens, q/k/v, gate and up of a step, logits."""
        c = self.config
        step = 3 * c.hidden_size + 3 * c.intermediate_size + 4 * c.num_heads * c.head_dim
        elements = work.tokens * 4 * c.hidden_size + min(work.tokens, CHUNK_TOKENS) * step
        narrow = any(len(self.tensors(s)) > len(c.sublayer_shapes(s.kind)) for s in order(c.num_layers))
        item = ITEM_BYTES[self.dtype]
        logits = c.vocab_size * (CHOICE_BYTES + (work.logits - 1) * (item + 4))  # only the last token's are chosen from
        return work.batch * (elements * item + logits) + narrow * self.scratch(work)

    def scratch(self, work: Workload) -> int:
        """What products with weights in few bits hold besides: dequantised rows, arranged inputs and partial sums."""
        c = self.config
        largest = max(math.prod(shape) for kind in KINDS for shape in c.sublayer_shapes(kind).values())
        rows = min(work.batch * work.tokens, ARRANGED_ROWS) + 256
        arranged = 2 * rows * (max(c.hidden_size, c.intermediate_size) + 128)
        return min(DEQUANTIZING_BYTES * largest + arranged + PARTIAL_SUMS_BYTES, SCRATCH_BYTES)

    def masks(self, work: Workload) -> int:
        """What PyTorch's attention holds besides: which keys each query of a step sees, in bool and as a bias."""
        return work.batch * min(work.tokens, CHUNK_TOKENS) * work.context * (2 + ITEM_BYTES[self.dtype])

    def fixed(self, work: Workload) -> int:
        """What every plan holds besides sublayers: embedding, norm, head, KV cache, activations.

        One layer of the cache counts twice: it is copied where beams change places, keys and then values, as one that
        came filled is to grow; and attention on a CPU puts both into an order of its own.
        """
        cache = self.kv_cache(work)
        return self.resident() + cache + cache // self.config.num_layers + self.activations(work)

    def tensors(self, sublayer: Sublayer) -> tuple[int, ...]:
        """Bytes of each tensor."""
        if sublayer in self.stored:
            return self.stored[sublayer]
        return _tensors(self.config, sublayer.kind, self.formats.of(sublayer) or PLAIN, self.dtype)


@lru_cache
def _tensors(config: ModelConfig, kind: Kind, format: Format, dtype: str) -> tuple[int, ...]:
    """Bytes of each tensor of a sublayer: a plan asks many times, and layers of one format are alike."""
    shapes = config.sublayer_shapes(kind).values()
    return tuple(part.nbytes for shape in shapes for part in format.parts(shape, dtype).values())
