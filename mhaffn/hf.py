"""The streamed model as transformers sees it: ``generate()``, streamers, caches and pipelines work on it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Never, Self

import torch
from transformers import AutoConfig, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from mhaffn.attention_interface import REFUSED, as_bool
from mhaffn.budget import Budget
from mhaffn.cache import reserve, rooms_of
from mhaffn.config import FEW_BITS, Sublayer
from mhaffn.device import memory_errors
from mhaffn.errors import ConfigError
from mhaffn.huggingface import refuse_quantized
from mhaffn.modules import Context
from mhaffn.opening import open_runner
from mhaffn.plan import Tier
from mhaffn.reader import Direct, Engine
from mhaffn.runner import Runner
from mhaffn.sizes import CHUNK_TOKENS
from mhaffn.store import Store, resolve
from mhaffn.streamed import require_stay


class StreamedLlama(PreTrainedModel, GenerationMixin):
    """A Llama-class causal language model whose decoder weights are streamed, sublayer by sublayer.

    Made by :func:`mhaffn.load`. It holds no parameters: weights belong to ``runner``. For inference only.
    Use it as a context manager, or call :meth:`close`.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig, runner: Runner) -> None:
        config._attn_implementation = "sdpa"
        super().__init__(config)
        self.runner = runner
        self._rotary = LlamaRotaryEmbedding(config).to(runner.device)
        self._rooms = rooms_of(runner.plan.work, runner.config.num_layers)
        self._finalizer = weakref.finalize(self, runner.close)

    @property
    def device(self) -> torch.device:
        return self.runner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.runner.dtype

    @can_return_tuple  # type: ignore[untyped-decorator]
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a captured graph would know places, not sublayers
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass; arguments and result as in ``LlamaForCausalLM.forward``.

        Raises :class:`ConfigError` when the sequence outgrows the context, or for an option that is not
        supported, and what the stream raises when a read fails.
        """
        self._refuse(kwargs)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        hidden, cache = self.hidden(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        with memory_errors():
            logits = self.runner.head(hidden[:, keep])
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if use_cache else None)

    def hidden(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> tuple[torch.Tensor, Cache | None]:
        """One pass up to the head: normalised hidden states ``[B, T, D]``, and the cache that holds its keys.

        Arguments and errors as of :meth:`forward`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give exactly one of input_ids and inputs_embeds")
        refuse_quantized(past_key_values)
        x = self.runner.embed(input_ids) if input_ids is not None else inputs_embeds
        assert x is not None  # one of the two was given
        batch, new, _ = x.shape
        long = new > CHUNK_TOKENS  # steps after the first need the keys of those before
        if past_key_values is None and (use_cache is not False or long):
            past_key_values = DynamicCache(config=self.config)
        seen = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        self.runner.check_room(batch, seen, new)
        reserve(past_key_values, self._rooms)
        mask, causal = self._mask(x, attention_mask, position_ids, past_key_values, seen + new)
        if position_ids is None:
            position_ids = torch.arange(seen, seen + new, device=x.device).unsqueeze(0)
        cos, sin = self._rotary(x.new_empty(0, dtype=torch.float32), position_ids)
        half = cos.shape[-1] // 2
        context = Context(
            cos[..., :half].contiguous(), sin[..., :half].contiguous(),
            length=seen + new if causal or mask is None else mask.shape[-1], mask=mask, causal=causal,
            cache=past_key_values,
        )  # fmt: skip
        with memory_errors():
            return self.runner.forward(x, context, seen), past_key_values

    def _mask(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        length: int,
    ) -> tuple[torch.Tensor | None, bool]:
        """The mask in bool, and whether attention is causal besides; transformers decides what is not plain padding."""
        if attention_mask is None and position_ids is None:
            return None, True
        if attention_mask is not None and attention_mask.dim() == 2:
            expected = (x.shape[0], length)
            if tuple(attention_mask.shape) != expected:
                raise ConfigError(
                    f"got attention_mask of shape {tuple(attention_mask.shape)}, expected {expected}: "
                    f"one value for each position, those in the cache too"
                )
            seen = attention_mask.to(x.device, torch.bool)
            return (None if seen.all() else seen[:, None, None, :]), True
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=cache,
            position_ids=position_ids,
        )  # fmt: skip
        return (None, True) if mask is None else (as_bool(mask), False)

    def _refuse(self, options: dict[str, Any]) -> None:
        given = {name: value for name, value in options.items() if value is not None}
        outputs = {name: getattr(self.config, name, False) for name in ("output_attentions", "output_hidden_states")}
        asked = [name for name, value in (outputs | given).items() if name in outputs and value]
        asked += [name for name in ("labels", *REFUSED) if name in given]
        if not given.get("is_causal", True):
            asked.append("is_causal=False")
        if asked:
            raise ConfigError(f"a streamed model does not take {asked[0]}; load the model with transformers for that")

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """Never: a captured CUDA graph would read places in memory where other sublayers lie by then."""
        return False

    def get_input_embeddings(self) -> torch.nn.Module:
        """Token ids to the vectors that ``inputs_embeds=`` takes; it shares the memory of the stream's own."""
        embedding: torch.nn.Module = torch.nn.Embedding.from_pretrained(self.runner.resident["embedding"])
        return embedding

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Never:
        """Refused: the weights are on disk."""
        raise ConfigError("a streamed model keeps its vocabulary; resize it with transformers, and save and pack that")

    def __reduce_ex__(self, protocol: Any) -> Never:
        raise ConfigError("a streamed model cannot be copied or pickled; load another")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the weights are on disk already, and not in this model."""
        raise ConfigError(
            f"a streamed model holds no weights to save; copy {self.runner.store.path}, or `mhaffn pack` it"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What ``to()``, ``half()``, ``cuda()`` and the like call: nothing moves, or an error says why it cannot."""
        require_stay(self.runner, fn)
        return self

    def close(self) -> None:
        """Ends all transfers and frees all weights; may be called more than once, and again after an interrupt."""
        self.runner.close()
        self._finalizer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def load(
    model: str | Path,
    *,
    gpu: Budget = "auto",
    dram: Budget = "auto",
    context: int | None = None,
    tokens: int | None = None,
    batch: int = 1,
    all_logits: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    engine: Engine = "auto",
    direct: Direct = "auto",
    strict: bool = False,
    verify: bool = True,
    tiers: dict[Sublayer, Tier] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> StreamedLlama:
    """Loads ``model`` – a Hugging Face folder, a packed store, or a hub id in the local cache – for streaming.

    - ``gpu``, ``dram``: budgets, as bytes or text like "14GiB". "auto" takes what is free now, with
      headroom; None or 0 keeps no sublayer there: everything is streamed from SSD.
    - ``context``: the longest sequence, prompt and answer together; 4096 or the model's limit, if less.
    - ``tokens``: the most of a sequence in one pass, its prompt; ``context`` unless given.
    - ``batch``: sequences at once, each beam one; the KV cache has room for ``batch`` times ``context`` positions,
      which more and shorter sequences may share.
    - ``all_logits``: leave room for the logits of every token, which ``model(ids)`` gives. Else there is room for those
      of the last alone, ``logits_to_keep=1``: all that ``generate()`` asks for.
    - ``dtype``: what the weights must be in, as "bfloat16"; they are streamed as they are, and never converted.
    - ``device``: "cuda" or "cpu"; CUDA where there is one.
    - ``engine``, ``direct``, ``strict``: how files are read, see :class:`mhaffn.reader.Reader`.
    - ``verify``: check a packed store's checksums as its bytes arrive.
    - ``tiers``: places every sublayer by hand, instead of by budget.
    - ``progress``: called with bytes done and bytes in all while resident weights load.

    Raises :class:`ConfigError`, :class:`UnsupportedModelError`, :class:`BudgetError`, :class:`StoreError`
    or :class:`ReadError`.
    """
    folder = resolve(model)
    store = Store.open(folder)
    if dtype is not None and str(dtype).removeprefix("torch.") not in ("auto", store.dtype):
        raise ConfigError(
            f"got dtype = {dtype}, but {folder} holds {store.dtype}, and weights are streamed as they are; "
            f"`mhaffn pack {folder} DST --dtype {str(dtype).removeprefix('torch.')}` converts them"
        )
    config, generation_config = transformers_configs(folder)
    runner = open_runner(
        store, gpu=gpu, dram=dram, context=context, tokens=tokens, batch=batch, all_logits=all_logits, device=device,
        engine=engine, direct=direct, strict=strict, verify=verify, tiers=tiers, progress=progress,
    )  # fmt: skip
    with ExitStack() as undo:  # a runner's threads keep it alive until it is closed
        undo.callback(runner.close)
        loaded = StreamedLlama(config, runner)
        if generation_config is not None:
            loaded.generation_config = generation_config
        undo.pop_all()
    return loaded


def transformers_configs(folder: Path) -> tuple[PreTrainedConfig, GenerationConfig | None]:
    """What ``generate()`` needs of the folder; raises :class:`ConfigError` where transformers cannot read it."""
    path = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) == FEW_BITS:  # which transformers would want to know
            del config.quantization_config
        path = folder / "generation_config.json"
        generation_config = GenerationConfig.from_pretrained(folder) if path.exists() else None
    except Exception as error:  # transformers and its validators raise many kinds
        raise ConfigError(f"{path}: transformers cannot read it: {error}. Fetch the file again.") from error
    stops = generation_config.eos_token_id if generation_config is not None else None
    for stop in stops if isinstance(stops, list) else [stops]:
        if stop is not None and (isinstance(stop, bool) or not isinstance(stop, int)):
            raise ConfigError(f"{path}: got eos_token_id = {stops!r}, expected a whole number or a list of them")
    return config, generation_config
