"""The host tier of a GPU: the blocks of all experts in pinned memory, packed where that pays.

It takes the experts over from the store underneath: a module's own tensors are freed layer by layer
and made again, bit by bit the same, when the model is given back. Experts that the store has as
they will be kept (in codes, packed, or not to be packed) are read into place, and no byte of them
passes the GPU; the GPU packs the others.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout, block_of
from runtime.cuda.memory.layer_packer import LayerPacker
from runtime.cuda.memory.layer_reader import LayerReader, reading_threads, turned
from runtime.cuda.memory.pinned import PinnedMemory, near_gpu
from runtime.cuda.memory.shared_memory import SharedMemory
from runtime.cuda.memory.unpacking import unpack_blocks
from runtime.weights.packed.packing import PATCHES
from runtime.weights.source import Source
from runtime.weights.store import ExpertStore


class PinnedExperts:
    """All experts of all layers, pinned.

    expert_blocks: of each layer, the layout of one expert (layers of one shape share theirs).
    packs: whether the readers take packed blocks. transposed: whether the store hands weights out
    as [in, out], where blocks keep [out, in].
    """

    def __init__(
        self,
        store: ExpertStore,
        num_experts: list[int],
        expert_blocks: list[ExpertBlock],
        device: torch.device,
        *,
        packs: bool,
        transposed: bool,
    ) -> None:
        self._store, self._num_experts = store, num_experts
        self._device, self._transposed = device, transposed
        self._memory = PinnedMemory()
        self._shared: SharedMemory | None = None
        self._pads: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.layers: list[Tensor] = []
        """Pinned, int16 [E, stored units] each."""
        can_pack = packs and all(block.can_pack for block in expert_blocks)
        found = self._patches_of_store(expert_blocks) if can_pack else None
        self._packs = can_pack and found is None
        patches = found or (PATCHES[0] if can_pack else 0)
        self.expert_blocks = [block.packed(patches) for block in expert_blocks]
        """Of each layer, as stored."""
        try:
            with near_gpu():
                if store.shared_as is None:
                    self._fill()
                else:
                    self._share(store.shared_as)
        except BaseException:
            self.close()
            raise

    @property
    def packed(self) -> bool:
        """Whether blocks are stored packed."""
        return self.expert_blocks[0].patches > 0

    def _patches_of_store(self, expert_blocks: list[ExpertBlock]) -> int | None:
        """Patches of a chunk, where the store has all experts in such blocks, packed; else None."""
        found = set()
        for layer, block in enumerate(expert_blocks):
            packed = self._store.packed(layer)
            if packed is None or packed.layout.fields != block.fields:
                return None
            found.add(packed.layout.patches)
        return found.pop() if len(found) == 1 else None

    def _fill(self) -> None:
        blocks, counts = self.expert_blocks, self._num_experts
        sizes = [  # of experts that the GPU packs, the bytes before
            2 * (block.units if self._packs else block.stored_units) * count
            for block, count in zip(blocks, counts, strict=True)
        ]
        store, transposed = self._store, self._transposed
        with self._reading(sum(sizes)) as to_pinned:
            if self._packs:
                plain = blocks[0].packed(0)
                packer = LayerPacker(
                    store, plain, counts, self._device, *to_pinned, transposed=transposed
                )
                with closing(packer):
                    self._pack(packer)
            blocks = self.expert_blocks
            reader = LayerReader(store, blocks, counts, *to_pinned, transposed=transposed)
            for layer in range(len(self.layers), len(counts)):
                self._keep(reader.take(layer))
        if self.packed and self._packs and self._store.advice is not None:
            warnings.warn(self._store.advice, stacklevel=2)

    @contextmanager
    def _reading(
        self, num_bytes: int
    ) -> Iterator[tuple[PinnedMemory, ThreadPoolExecutor, Callable[[int], object]]]:
        """The memory, threads that read into it, and whom to tell of the bytes that are there."""
        title = "experts to pinned memory"
        with (
            tqdm(total=num_bytes, unit="B", unit_scale=True, desc=title, leave=False) as bar,
            reading_threads(self._store) as threads,
        ):
            yield self._memory, threads, bar.update

    def _share(self, name: str) -> None:
        """Take over what another process has read, or read it for all. Raises ValueError where the
        experts are not stored as they are kept.
        """
        if self._packs:
            raise ValueError(
                "host='shared' needs experts that are stored as they are kept: `expertflow prepare "
                "MODEL OUT --packed` writes such a copy"
            )
        blocks, counts = self.expert_blocks, self._num_experts
        shapes = [(n, block.stored_units) for n, block in zip(counts, blocks, strict=True)]

        def fill(layers: list[Tensor]) -> None:
            with self._reading(sum(layer_EN.nbytes for layer_EN in layers)) as to_pinned:
                reader = LayerReader(
                    self._store, blocks, counts, *to_pinned,
                    transposed=self._transposed, room=layers.__getitem__,
                )  # fmt: skip
                for layer in range(len(layers)):
                    reader.read(layer)

        stored = [(block.stored_fields, block.patches) for block in blocks]
        layout = hashlib.sha256(repr((stored, self._transposed)).encode()).hexdigest()[:8]
        self._shared = SharedMemory(f"{name}-{layout}", shapes, fill)
        for layer_EN in self._shared.tensors:
            self._memory.register(layer_EN)
            self._keep(layer_EN)

    def _pack(self, packer: LayerPacker) -> None:
        """Pack all layers, or none where some weights do not pack: the rest is then to be read."""
        while self.packed and len(self.layers) < len(self._num_experts):
            layer = len(self.layers)
            taken = packer.take(layer, self.expert_blocks[layer])
            if taken is None:
                self._store_otherwise()
            else:
                self._keep(taken)

    def _keep(self, stored_EN: Tensor) -> None:
        """Take over the next layer from the store."""
        self.layers.append(stored_EN)
        self._store.release(len(self.layers) - 1)

    def _empty(self, layer: int, block: ExpertBlock) -> Tensor:
        return self._memory.empty((self._num_experts[layer], block.stored_units), torch.int16)

    def _store_otherwise(self) -> None:
        """Store all layers in another form, since some weights have more patches than there is room
        for: with more room or unpacked. Kernels are compiled for one form.
        """
        more = [*PATCHES, 0]
        patches = more[more.index(self.expert_blocks[0].patches) + 1]
        expert_blocks = [block.packed(patches) for block in self.expert_blocks]
        for layer, stored_EN in enumerate(self.layers):
            again_EN = self._stored_again(layer, expert_blocks[layer])
            self.layers[layer], self.expert_blocks[layer] = again_EN, expert_blocks[layer]
            self._let_go(stored_EN)
        self.expert_blocks = expert_blocks

    def _stored_again(self, layer: int, block: ExpertBlock) -> Tensor:
        """A layer's experts, as `block` stores them."""
        again_EN = self._empty(layer, block)
        for expert in range(len(again_EN)):
            stored_N = block.store(self._on_device(layer, expert))
            assert stored_N is not None  # there was room in less
            again_EN[expert].copy_(stored_N)
        return again_EN

    def _as_model(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of one expert in a block, in the store's own orientation."""
        return turned(parameters) if self._transposed else parameters

    # ------------------------------------------------------------------ reading

    def send(self, layer: int, expert: int, into: Tensor) -> None:
        """Send a stored block over the link, on the current stream, to int16 [stored units]."""
        into.copy_(self.layers[layer][expert], non_blocking=True)

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The parameters of one expert on the device, as the store hands them out, in memory of
        their own.
        """
        return self._as_model(self.expert_blocks[layer].views(self._on_device(layer, expert)))

    def _on_device(self, layer: int, expert: int) -> Tensor:
        """One block, unpacked, int16 [units], in device memory of its own."""
        block = self.expert_blocks[layer]
        stored_N = torch.empty(block.stored_units, dtype=torch.int16, device=self._device)
        self.send(layer, expert, stored_N)
        if block.is_plain:
            return stored_N
        block_1N = torch.empty(1, block.units, dtype=torch.int16, device=self._device)
        picked = torch.zeros(1, dtype=torch.int32, device=self._device)
        unpack_blocks(block, stored_N[None], picked, block_1N)
        return block_1N[0]

    def link_bytes(self, layer: int) -> int:
        """Bytes that cross the link for one expert of `layer`."""
        return self.expert_blocks[layer].stored_units * 2

    # ------------------------------------------------------------------ giving back

    def _give_back(self) -> None:
        """Make the store's own tensors again, an expert at a time, and free each layer's
        blocks: both copies of a large model would not fit in memory.
        """
        for layer in reversed(range(len(self.layers))):
            if self._store.is_released(layer):
                self._store.refill(layer, partial(self._read_one, layer))
            self._let_go(self.layers.pop())

    def _read_one(self, layer: int, expert: int) -> dict[str, Tensor]:
        views = self.read(layer, expert)
        return {name: self._landed(name, view) for name, view in views.items()}

    def _landed(self, name: str, view: Tensor) -> Tensor:
        """A parameter copied to pinned memory, at the link's speed; good until the next one.

        Where nothing more can be pinned (perhaps the reason why all is given back), as it is.
        """
        key = name, tuple(view.shape)
        try:
            if key not in self._pads:
                self._pads[key] = self._memory.empty(key[1], view.dtype)
        except MemoryError:
            return view
        return self._pads[key].copy_(view)

    def _let_go(self, stored_EN: Tensor) -> None:
        torch.cuda.synchronize()  # the last copy out of them
        self._memory.release(stored_EN)

    def close(self) -> None:
        """Give the experts back to the store and unpin. Nothing may be reading."""
        self._give_back()
        self._memory.close()
        if self._shared is not None:
            self._shared.close()


def host_tier(source: Source, layout: KernelLayout | None, device: torch.device) -> PinnedExperts:
    """The host tier of a model. layout: that of its experts, where kernels can run them."""
    store, counts = source.store, [layer.num_experts for layer in source.layers]
    blocks = [
        block_of(store.specs(index), store.coding(index), layout) for index in range(len(counts))
    ]
    transposed = layout is not None and layout.transposed
    return PinnedExperts(
        store, counts, blocks, device, packs=layout is not None, transposed=transposed
    )
