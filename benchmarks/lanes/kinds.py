"""The kinds of work that a lane shows, and the kernels that are of each kind."""

from __future__ import annotations

import re

LINK, HOST, PREDICTOR, GPU = "link", "host", "predictor", "GPU"
"""Rows of the lanes. Any other row is of the CPU, too."""

FETCHED, PREFETCHED, COPIED = "fetched by kernels", "prefetched", "copied"
HOST_WORK, PREDICTION = "host thread", "predictor thread"
EXPERTS, MODEL, PLAN, OTHER = "experts", "attention, dense", "plan", "other"
WAITING = "waiting for link or CPU"

KERNELS = {
    EXPERTS: r"^(gate_up|gate_up_of_one|down|join|arrange|grouped_gate_up|grouped_down|combine|"
    r"unpack|decode|copy_behind)$|grouped_mm|groupproblem",
    PLAN: r"^(plan|pick|halt|sort_pairs)$",
    WAITING: r"^collect$",
    PREFETCHED: r"^fetch$",
    FETCHED: r"^project$",
    MODEL: r"^(attend_blocks|join_blocks|write_tokens|gather|_normalise|_choose)$|^triton_|"
    r"at::native|fmha|flash|attention|sdpa|softmax|gemm|gemv|cutlass|nvjet|splitk|cublas",
}
"""Kinds by a pattern of lower-case kernel names: the project's own, torch's and its compiler's.

`project` is the output head where it stays in host memory: it is as fast as the link.
"""


def kind_of(name: str) -> str:
    """The kind of a kernel, or of a copy by the copy engine; `OTHER` for an unknown name."""
    lower = name.lower()
    if lower.startswith("memcpy "):
        return COPIED if "htod" in lower or "dtoh" in lower else OTHER
    return next((kind for kind, pattern in KERNELS.items() if re.search(pattern, lower)), OTHER)


def lane_of(row: str) -> str:
    """The lane that a row is in: link, CPU or GPU."""
    return row if row in (LINK, GPU) else "CPU"
