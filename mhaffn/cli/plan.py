"""``mhaffn plan``: predict a pass on a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mhaffn.cli.common import FormatOption, JsonOption, results, write_json
from mhaffn.errors import ConfigError


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="llama3-70b, llama3-8b, or a model folder or hub id, of which config.json is enough; or a packed "
            "store, as it is."
        ),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Analyse a JSON file of times measured by sublayer instead.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="A machine measured with `mhaffn doctor --measure`; by default the one measured here."),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="GPU memory (unmeasured: 16GiB).")] = None,
    dram: Annotated[str | None, typer.Option(help="Host memory for weights (unmeasured: 32GiB).")] = None,
    ssd: Annotated[str | None, typer.Option(help="SSD speed a second (unmeasured: 5GB).")] = None,
    h2d: Annotated[
        str | None,
        typer.Option(help="Host-to-GPU speed a second: PCIe 4 x16 25GB, PCIe 5 x16 50GB (unmeasured: 25GB)."),
    ] = None,
    hbm: Annotated[str | None, typer.Option(help="GPU memory speed a second (unmeasured: 900GB).")] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.1, help="bf16 TFLOP/s the GPU reaches (unmeasured: 100).")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the prefill [2048, or what the model knows, if less].")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Positions in the KV cache [4096, or what the model knows, if less].")
    ] = None,
    mha: FormatOption = None,
    ffn: FormatOption = None,
    json_file: JsonOption = None,
) -> None:
    """Predict seconds a pass on a machine, before any weights are there, and what would help most.

    Figures given here count before measured ones (`mhaffn doctor --measure`), and those before typical ones.

    mhaffn plan llama3-70b --gpu 16GiB --dram 64GiB --ssd 4.7GB --h2d 44GB

    Fewer bits are always compared; --ffn int4:64 --mha int8 adds a mix of your own, as `mhaffn pack` takes it.
    """
    from mhaffn import planning
    from mhaffn.formats import Formats
    from mhaffn.measured import Measured, analyse, outlook
    from mhaffn.profile import Profile

    values: object
    if model is not None and measured is None:
        config, stored = planning.model_of(model)
        given = planning.Hardware.parse(gpu=gpu, dram=dram, ssd=ssd, h2d=h2d, hbm=hbm, tflops=tflops)
        known = Profile.of_this_machine() if profile is None else Profile.read(profile)
        work = planning.workload_of(config, prompt_tokens, context)
        machine, source = planning.machine_for(config, given, known, work)
        formats = Formats.parse(mha, ffn)
        formats.check(config)
        found, shown = planning.plan_for(config, machine, source, formats or None, stored)
        values = planning.plan_to_dict(machine, source, found)
    elif measured is not None and model is None:
        others = {
            "profile": profile, "gpu": gpu, "dram": dram, "ssd": ssd, "h2d": h2d, "hbm": hbm, "tflops": tflops,
            "prompt-tokens": prompt_tokens, "context": context, "mha": mha, "ffn": ffn,
        }  # fmt: skip
        for name, value in others.items():
            if value is not None:
                raise ConfigError(f"got --{name} beside --measured, whose file has all figures: change them there")
        figures = Measured.read(measured)
        layers, steps = analyse(figures), outlook(figures)
        shown = planning.analysis(figures, layers, steps)
        values = planning.analysis_to_dict(figures, layers, steps)
    elif measured is not None:
        raise ConfigError(f"got {model} beside --measured, whose file has the model's widths too: give one of them")
    else:
        raise ConfigError("give a MODEL, or --measured FILE")
    results(json_file).print(shown)
    write_json(values, json_file)
