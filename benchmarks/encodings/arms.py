"""Arms of the benchmark of encodings, the most important first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, product

from benchmarks.common.coded_models import PLAIN, check_encoding
from benchmarks.common.shapes import shape_named
from benchmarks.encodings.settings import EncodingSettings
from benchmarks.systems.arm import FULL, ONE_GUESS, Arm

TRACE = "trace"
"""The routes of an arm that replays a trace."""
QUARTER = "0.25"
SHARED = QUARTER, "0.1"
"""Residencies at which the CPU's share is measured."""
TIMED_WITH_CPU = ("olmoe-7b",)
"""Shapes whose CPU's share is measured."""
TIMED_UNCAPTURED = "qwen3-next-80b-a3b", "deepseek-v2-lite", "granite-4-h-tiny", "llama-4-scout"
"""Shapes whose captured steps are compared with the same steps uncaptured: layers that recur, that
keep compressed states, and that attend in chunks.
"""
MEMORY = {
    "olmoe-7b": "4.2GiB",
    "gpt-oss-20b": "6GiB",
    "gpt-oss-120b": "20GiB",
    "qwen3-30b-a3b": "10GiB",
    "mixtral-8x7b": "10GiB",
    "qwen3-next-80b-a3b": "24GiB",
    "deepseek-v2-lite": "6GiB",
    "granite-4-h-tiny": "3GiB",
    "llama-4-scout": "32GiB",
    "tiny": "6MiB",
    "tiny-gpt-oss": "8MiB",
}
"""GPU memory of the rows of equal memory."""
OF_SHAPE = {
    "gpt-oss-20b": ("mxfp4", PLAIN),
    "gpt-oss-120b": ("mxfp4",),
    "tiny-gpt-oss": ("mxfp4", PLAIN),
    "qwen3-30b-a3b": ("int4", "fp8", PLAIN),
    "mixtral-8x7b": ("int4",),
    "qwen3-next-80b-a3b": ("int4",),
    "deepseek-v2-lite": ("int4", PLAIN),
    "granite-4-h-tiny": ("int4", PLAIN),
    "llama-4-scout": ("nvfp4",),
}
"""Encodings of a shape, where not all of them: those in which such models are published, and
bfloat16 where a host of 128 GB holds it."""
ALL = ("mxfp4", "int4", "int4-128", "fp8", "nvfp4", PLAIN)


@dataclass(frozen=True, kw_only=True)
class CodedArm(Arm):
    """One shape in one encoding, in so much memory, with these routes."""

    system: str = "expertflow"
    policy: str | None = "lru"
    shape: str
    encoding: str
    routes: str
    """TRACE, or the locality with which they are drawn."""

    @property
    def name(self) -> str:
        words = super().name.split()[1:]
        return " ".join([self.shape, self.encoding, *words, self.routes])

    @property
    def load(self) -> CodedArm:
        """Equal for the arms that one loaded model serves."""
        return replace(self, routes="", is_captured=True)


def encoding_arms(
    settings: EncodingSettings, traced: set[str], predicted: set[str]
) -> list[CodedArm]:
    """All arms that the settings ask for, the compiled ones of all shapes last.

    traced, predicted: shapes whose topology the trace and the predictor have. Raises ValueError for
    an unknown shape, encoding or arm.
    """
    for encoding in settings.encodings:
        check_encoding(encoding)
    arms: list[CodedArm] = []
    for shape in settings.shapes:
        shape_named(shape)
        if shape not in MEMORY:
            raise ValueError(f"shape {shape} has no rows here: give one of {', '.join(MEMORY)}")
        routes = [TRACE] if shape in traced else [str(x) for x in settings.localities]
        policy = "predicted" if shape in predicted else "reuse"
        arms += _arms_of(shape, routes, policy, settings.memory or MEMORY[shape])
    arms = [arm for arm in dict.fromkeys(arms) if _is_chosen(arm, settings)]
    arms.sort(key=lambda arm: arm.compile)  # what takes longest comes last, of all shapes
    if not arms:
        raise ValueError("no arm is left: --only and --encodings name none of these shapes'")
    return arms


def groups(arms: list[CodedArm]) -> list[list[CodedArm]]:
    """The arms in their order, those together that follow each other on one loaded model."""
    return [list(group) for _, group in groupby(arms, key=lambda arm: arm.load)]


def _is_chosen(arm: CodedArm, settings: EncodingSettings) -> bool:
    if settings.only:
        return arm.name in settings.only
    needs_gpu = arm.compile or bool(arm.prefetch)
    return (
        not (settings.encodings and arm.encoding not in settings.encodings)
        and not (arm.compile and not settings.compile)
        and not (needs_gpu and settings.device == "cpu")
    )


def _arms_of(shape: str, routes: list[str], policy: str, memory: str) -> Iterator[CodedArm]:
    encodings = OF_SHAPE.get(shape, ALL)
    narrow = [encoding for encoding in encodings[:3] if encoding not in (PLAIN, "fp8")]
    fits = shape not in ("gpt-oss-120b", "mixtral-8x7b")

    def arm(encoding: str, residency: str, *, at: str = routes[0], **options: object) -> CodedArm:
        arm = CodedArm(shape=shape, encoding=encoding, residency=residency, routes=at)
        return replace(arm, **options)  # type: ignore[arg-type]

    leading = encodings[0]
    if shape in TIMED_UNCAPTURED:
        for residency, captured in product((FULL, QUARTER), (True, False)):
            yield arm(leading, residency, policy=policy, is_captured=captured)
    if fits:
        yield from (arm(encoding, FULL) for encoding in narrow)
        yield from (arm(leading, QUARTER, at=at, policy=policy) for at in routes)
        for ahead in (ONE_GUESS, True):
            yield arm(leading, QUARTER, policy=policy, prefetch=ahead)
    yield from (arm(leading, memory, at=at, policy=policy) for at in routes)
    yield from (arm(encoding, memory, policy=policy) for encoding in encodings)
    if fits:
        yield from (arm(encoding, FULL, compile=True) for encoding in narrow)
        timed = (PLAIN, leading) if shape in TIMED_WITH_CPU else (leading,)
        for encoding in timed:
            for ahead in (False, ONE_GUESS, True):
                yield arm(encoding, QUARTER, policy=policy, prefetch=ahead, compile=True)
    else:
        yield arm(leading, QUARTER)  # another residency, for the logits
    yield from (arm(encoding, memory, compile=True) for encoding in narrow)
    yield from (arm(encoding, memory, policy=policy, compile=True) for encoding in encodings)
    for encoding, residency, compiles in product((PLAIN, leading), SHARED, (True, False)):
        if shape in TIMED_WITH_CPU and encoding in encodings:
            yield from (
                arm(encoding, residency, policy=policy, compile=compiles, cpu_share=share)
                for share in (False, True)
            )
