"""The streamed model as transformers sees it: ``generate()``, streamers, caches and pipelines work on it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self, get_args

import torch
from transformers import AutoConfig, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mhaffn.budget import Budget, free_dram, free_gpu, resolve_budget
from mhaffn.config import ModelConfig, Sublayer
from mhaffn.device import choose_device
from mhaffn.errors import ConfigError
from mhaffn.modules import Context
from mhaffn.plan import Sizes, Tier, Workload, make_plan
from mhaffn.runner import Direct, Engine, Runner
from mhaffn.store import Store, resolve

CONTEXT = 4096


class StreamedLlama(PreTrainedModel, GenerationMixin):
    """A Llama-class causal language model whose decoder weights are streamed, sublayer by sublayer.

    Made by :func:`mhaffn.load`. It holds no parameters: weights belong to ``runner``. For inference only.
    Use it as a context manager, or call :meth:`close`.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig, runner: Runner, context: int) -> None:
        config._attn_implementation = "sdpa"
        super().__init__(config)
        self.runner, self.context = runner, context
        self._rotary = LlamaRotaryEmbedding(config).to(runner.device)
        self._finalizer = weakref.finalize(self, runner.close)

    @property
    def device(self) -> torch.device:
        return self.runner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.runner.dtype

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
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give exactly one of input_ids and inputs_embeds")
        x = self.runner.embed(input_ids) if input_ids is not None else inputs_embeds
        assert x is not None  # one of the two was given
        if past_key_values is None and use_cache is not False:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        self._check_length(int(seen), x.shape[1])
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device).unsqueeze(0) + seen
        context = self._context(x, attention_mask, position_ids, past_key_values)
        hidden = self.runner.forward(x, context)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.runner.head(hidden[:, keep]),
            past_key_values=past_key_values if use_cache is not False else None,
        )

    def _context(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: Cache | None
    ) -> Context:
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=cache,
            position_ids=position_ids,
        )  # fmt: skip
        cos, sin = self._rotary(x.new_empty(0, dtype=torch.float32), position_ids)
        half = cos.shape[-1] // 2
        return Context(cos[..., :half].contiguous(), sin[..., :half].contiguous(), mask, cache)

    def _check_length(self, seen: int, new: int) -> None:
        if seen + new > self.context:
            raise ConfigError(
                f"got a sequence of {seen + new} tokens, expected at most {self.context}, the context this model was "
                f"loaded with. Load it with context={seen + new} or more; the model itself knows "
                f"{self.config.max_position_embeddings} positions."
            )

    def _refuse(self, options: dict[str, Any]) -> None:
        for name in ("labels", "output_attentions", "output_hidden_states"):
            if options.get(name):
                raise ConfigError(f"a streamed model does not take {name}; load the model with transformers for that")

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """Never: a captured CUDA graph would read places in memory where other sublayers lie by then."""
        return False

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the weights are on disk already, and not in this model."""
        raise ConfigError(
            f"a streamed model holds no weights to save; copy {self.runner.store.path}, or `mhaffn pack` it"
        )

    def close(self) -> None:
        """Ends all transfers and frees all weights; may be called more than once."""
        self._finalizer()

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
    - ``tokens``: the longest prompt; ``context`` unless given.
    - ``device``: "cuda" or "cpu"; CUDA where there is one.
    - ``engine``, ``direct``, ``strict``: how files are read, see :class:`mhaffn.reader.Reader`.
    - ``verify``: check a packed store's checksums as its bytes arrive.
    - ``tiers``: places every sublayer by hand, instead of by budget.
    - ``progress``: called with bytes done and bytes in all while resident weights load.

    Raises :class:`ConfigError`, :class:`UnsupportedModelError`, :class:`BudgetError`, :class:`StoreError`
    or :class:`ReadError`.
    """
    for name, value, choices in (("engine", engine, get_args(Engine)), ("direct", direct, get_args(Direct))):
        if value not in choices:
            raise ConfigError(f"got {name} = {value!r}, expected one of {', '.join(choices)}")
    folder = resolve(model)
    store = Store.open(folder)
    context = _context_length(store.config, context)
    device = choose_device(device)
    copies = device.type == "cuda"
    work = Workload(tokens=min(tokens or context, context), context=context)
    sizes = Sizes(store.config, store.dtype)
    if not copies and gpu != "auto" and resolve_budget(gpu, lambda: 0):
        raise ConfigError(f"got gpu = {gpu!r}, but the device is the CPU; give dram instead, or a CUDA device")
    plan = make_plan(
        store.config,
        store.dtype,
        gpu=resolve_budget(gpu, partial(free_gpu, device)) if copies else None,
        dram=resolve_budget(dram, lambda: max(free_dram() - (0 if copies else sizes.fixed(work)), 0)),
        copies=copies,
        work=work,
        tiers=tiers,
    )
    config, generation_config = _transformers_configs(folder)
    runner = Runner(
        store, plan, device=device, engine=engine, direct=direct, strict=strict, verify=verify, progress=progress
    )
    loaded = StreamedLlama(config, runner, context)
    if generation_config is not None:
        loaded.generation_config = generation_config
    return loaded


def _transformers_configs(folder: Path) -> tuple[PreTrainedConfig, GenerationConfig | None]:
    """What ``generate()`` needs of the folder; raises :class:`ConfigError` where transformers cannot read it."""
    path = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder)
        path = folder / "generation_config.json"
        generation_config = GenerationConfig.from_pretrained(folder) if path.exists() else None
    except Exception as error:  # transformers and its validators raise many kinds
        raise ConfigError(f"{path}: transformers cannot read it: {error}. Fetch the file again.") from error
    stops = generation_config.eos_token_id if generation_config is not None else None
    for stop in stops if isinstance(stops, list) else [stops]:
        if stop is not None and (isinstance(stop, bool) or not isinstance(stop, int)):
            raise ConfigError(f"{path}: got eos_token_id = {stops!r}, expected a whole number or a list of them")
    return config, generation_config


def _context_length(config: ModelConfig, context: int | None) -> int:
    limit = config.max_position_embeddings
    if context is not None and not 0 < context <= limit:
        raise ConfigError(f"got context = {context}, expected 1 to {limit}, the positions this model knows")
    return context or min(CONTEXT, limit)
