"""The host tier on a GPU machine: the records of all experts in pinned memory, packed if that pays.

It takes the experts over from the store underneath: a module's own tensors are freed layer by layer
and made again, bit by bit the same, when the model is given back.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from runtime.cuda.packing import pack
from runtime.cuda.pinned import PinnedMemory, near_gpu
from runtime.cuda.record import CHUNK, Record
from runtime.cuda.transfer_kernels import LANDINGS, land
from runtime.store import ExpertStore


class LayerRecords(NamedTuple):
    """One layer's experts, as kernels take them: in this order.

    Where records are not packed, `low` is int16 [E, N] and the others are empty.
    """

    low: Tensor
    """pinned, uint8 [E, N]"""
    high: Tensor
    """pinned, uint8 [E, N / 2]"""
    base: Tensor
    """device, as in `Packed`, and the following"""
    patch_starts: Tensor
    patch_units: Tensor
    patch_bits: Tensor


class HostTier:
    """All experts of all layers, pinned.

    record: of one expert, of each layer (layers of one shape share theirs). transposed: whether the
    store hands weights out as [in, out], where records keep [out, in].
    """

    def __init__(
        self,
        store: ExpertStore,
        num_experts: list[int],
        records: list[Record],
        device: torch.device,
        *,
        transposed: bool,
    ) -> None:
        self._store, self._num_experts, self._records = store, num_experts, records
        self._device, self._transposed = device, transposed
        self._memory = PinnedMemory()
        self._pads: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.layers: list[LayerRecords] = []
        self.packed = all(record.is_bf16 for record in records)
        try:
            with near_gpu():
                self._fill()
        except BaseException:
            self._give_back()
            self._memory.close()
            raise

    def _fill(self) -> None:
        sizes = [
            2 * record.units * count
            for record, count in zip(self._records, self._num_experts, strict=True)
        ]
        title = "experts to pinned memory"
        with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc=title, leave=False) as bar:
            for layer, size in enumerate(sizes):
                taken = self._take_packed(layer) if self.packed else None
                if taken is None and self.packed:
                    self._unpack_all()  # kernels are compiled for one form
                self.layers.append(taken or self._take_raw(layer))
                self._store.release(layer)
                bar.update(size)

    def _take_packed(self, layer: int) -> LayerRecords | None:
        """Pack a layer, an expert at a time; None where its weights do not pack."""
        count, units = self._num_experts[layer], self._records[layer].units
        low = self._memory.empty((count, units), torch.uint8)
        high = self._memory.empty((count, units // 2), torch.uint8)
        patches: list[tuple[Tensor, ...]] = []
        for expert, record_N in enumerate(self._gather(layer)):
            packed = pack(record_N.view(-1, CHUNK))
            if packed is None:
                return None
            low[expert].copy_(packed.low_DC.view(-1))
            high[expert].copy_(packed.high_DC.view(-1))
            patches.append(packed[2:])
        base, counts, patch_units, patch_bits = map(torch.cat, zip(*patches, strict=True))
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return LayerRecords(low, high, base, starts, patch_units, patch_bits)

    def _take_raw(self, layer: int) -> LayerRecords:
        low = self._memory.empty(
            (self._num_experts[layer], self._records[layer].units), torch.int16
        )
        for expert, record_N in enumerate(self._gather(layer)):
            low[expert].copy_(record_N)
        return self._raw(low)

    def _raw(self, low: Tensor) -> LayerRecords:
        nothing = torch.zeros(1, dtype=torch.int32, device=self._device)
        return LayerRecords(low, nothing, nothing, nothing, nothing, nothing)

    def _gather(self, layer: int) -> Iterator[Tensor]:
        """The layer's records, one after the other in the same device memory, int16 [N]."""
        record = self._records[layer]
        record_N = torch.zeros(record.units, dtype=torch.int16, device=self._device)
        views = self._as_model(record.views(record_N))
        for expert in range(self._num_experts[layer]):
            self._store.read(layer, expert, views)
            yield record_N

    def _as_model(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of one expert in a record, in the store's own orientation."""
        if not self._transposed:
            return parameters
        return {name: p.mT if p.dim() == 2 else p for name, p in parameters.items()}

    def _unpack_all(self) -> None:
        """Some weights do not pack: from here on, and from the start, all are kept as they are."""
        packed, self.layers = self.layers, []
        for records in packed:
            low = self._memory.empty(tuple(records.low.shape), torch.int16)
            for expert in range(len(low)):
                low[expert].copy_(self._on_device(records, expert))
            self.layers.append(self._raw(low))
            self._let_go(records)
        self.packed = False

    # ------------------------------------------------------------------ reading

    def send(self, layer: int, experts: list[int], into: tuple[Tensor, ...]) -> None:
        """Send records over the link, on the current stream: to the first rows of low and high
        (uint8 [*, N] and [*, N / 2]) where packed, else of int16 [*, N].
        """
        _send(self.layers[layer], experts, into)

    def land(
        self, layer: int, experts: list[int], sent: tuple[Tensor, ...], slots_SN: Tensor,
        slots: list[int],
    ) -> None:  # fmt: skip
        """Unpack records that `send` sent, at most `LANDINGS`, into `slots` of slots [S, N], on the
        current stream.
        """
        _land(self.layers[layer], experts, sent, slots_SN, slots)

    def _on_device(self, records: LayerRecords, expert: int) -> Tensor:
        """One record, int16 [N], in device memory of its own."""
        units = records.low.shape[1]
        record_1N = torch.empty(1, units, dtype=torch.int16, device=self._device)
        if records.low.dtype == torch.int16:
            _send(records, [expert], (record_1N,))
            return record_1N[0]
        sent = tuple(
            torch.empty(1, part.shape[1], dtype=part.dtype, device=self._device)
            for part in (records.low, records.high)
        )
        _send(records, [expert], sent)
        _land(records, [expert], sent, record_1N, [0])
        return record_1N[0]

    def link_bytes(self, layer: int) -> int:
        """Bytes that cross the link for one expert of `layer`."""
        return self._records[layer].units * (3 if self.packed else 4) // 2

    # ------------------------------------------------------------------ giving back

    def _give_back(self) -> None:
        """Make the store's own tensors again, an expert at a time, and let go of each layer's
        records: both copies of a large model would not fit in memory.
        """
        for layer in reversed(range(len(self.layers))):
            records = self.layers[layer]
            if self._store.is_released(layer):
                self._store.refill(layer, partial(self._read_one, layer, records))
            del self.layers[layer]
            self._let_go(records)

    def _read_one(self, layer: int, records: LayerRecords, expert: int) -> dict[str, Tensor]:
        record_N = self._on_device(records, expert)
        views = self._as_model(self._records[layer].views(record_N))
        return {name: self._landed(name, view) for name, view in views.items()}

    def _landed(self, name: str, view: Tensor) -> Tensor:
        """A parameter in pinned memory, which it reaches at the link's speed; good until the next.

        Where nothing more can be pinned (which may be why all is given back), as it is.
        """
        key = name, tuple(view.shape)
        try:
            if key not in self._pads:
                self._pads[key] = self._memory.empty(key[1], view.dtype)
        except MemoryError:
            return view
        return self._pads[key].copy_(view)

    def _let_go(self, records: LayerRecords) -> None:
        torch.cuda.synchronize()  # the last copy out of them
        self._memory.release(records.low)
        self._memory.release(records.high)

    def close(self) -> None:
        """Give the experts back to the store and unpin. Nothing may be reading."""
        self._give_back()
        self._memory.close()


def _send(records: LayerRecords, experts: list[int], into: tuple[Tensor, ...]) -> None:
    """Neighbours in host memory cross together."""
    at = 0
    for first, count in runs(experts):
        for part, tensor in zip((records.low, records.high), into, strict=False):
            tensor[at : at + count].copy_(part[first : first + count], non_blocking=True)
        at += count


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Stretches of successive numbers, each as its first and its length."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        first, count = found[-1] if found else (-1, 0)
        if number == first + count:
            found[-1] = first, count + 1
        else:
            found.append((number, 1))
    return found


def _land(
    records: LayerRecords, experts: list[int], sent: tuple[Tensor, ...], slots_SN: Tensor,
    slots: list[int],
) -> None:  # fmt: skip
    units, padding = slots_SN.shape[1], [0] * (LANDINGS - len(experts))
    land[(units // CHUNK, len(experts))](
        slots_SN, *sent, *records[2:], *experts, *padding, *slots, *padding,
        UNITS=units, CHUNK=CHUNK,
    )  # fmt: skip
