"""The snippets of docs/integrations.md, run as they stand, where their folders hold tiny models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.live_models import make

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
SNIPPETS = {
    section.partition("\n")[0]: code
    for section in TEXT.split("\n## ")[1:]
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models that the snippets open."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("place")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(211)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, family in (("Llama-3.1-8B", "Llama"), ("Mistral-7B", "Mistral")):
        make(family).save_pretrained(folder / name)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3", pad_token="w0")
        tokenizer.save_pretrained(folder / name)
    return folder


def test_every_way_in_has_a_snippet() -> None:
    assert len(SNIPPETS) == len(re.findall(r"^## ", TEXT, re.MULTILINE)) == TEXT.count("```python") == 7


@pytest.mark.parametrize("section", [name for name in SNIPPETS if "Meta" not in name])
def test_a_snippet_runs(
    section: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    names: dict[str, object] = {}
    exec(compile(SNIPPETS[section], section, "exec"), names)
    printed = capsys.readouterr().out
    if "mhaffn.replace" in SNIPPETS[section]:
        assert printed.splitlines()[0] in TEXT
    if "generate" in SNIPPETS[section]:
        assert len(re.findall(r"w\d+", printed)) == 24  # four words given, twenty made


@pytest.mark.slow
def test_the_snippet_for_metas_code_runs(place: Path) -> None:
    if "CI" not in os.environ and find_spec("llama_models") is None:
        pytest.skip("pip install llama-models==0.3.0 fairscale==0.4.13")
    resident, streamed = (SNIPPETS[f"Meta's reference code{more}"] for more in ("", ", streamed"))
    prelude = resident.partition("model.load_state_dict")[0]
    program = (
        f"{prelude}\ntorch.nn.init.ones_(model.norm.weight)\ntorch.save(model.state_dict(), 'consolidated.00.pth')"
    )
    printed = []
    for text in (program, resident, f"{streamed}\nassert logits.isfinite().all()"):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        ran = subprocess.run([sys.executable, "-c", text], cwd=place, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        printed.append(ran.stdout)
    assert "replaced 9 modules: 2 Attention, 2 FeedForward, 5 RMSNorm" in printed[1]
    assert "replaced 3 modules: 3 TransformerBlock" in printed[2]
    assert torch.load(place / "consolidated.00.pth", weights_only=True)["norm.weight"].shape == (128,)
