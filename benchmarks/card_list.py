"""The GPUs whose kernels are compiled ahead of time, and what each is able to hold."""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.kernels.attention.launch_configs import Unit


@dataclass(frozen=True)
class Card:
    """A generation of GPUs.

    Attributes:
        target: compute capability, 90 for 9.0, or AMD's name of the architecture.
        products: what the matrix products of half precision must be compiled to, a part of the instruction's name.
        shared_kib: KiB of shared memory that a program may have (CUDA C++ Programming Guide, "Technical Specifications
            per Compute Capability"; of AMD, LDS of a workgroup).
    """

    target: int | str
    generation: str
    examples: str
    shared_kib: int
    products: str

    @property
    def unit(self) -> Unit:
        """Who multiplies a tile of rows by itself."""
        units: dict[str, Unit] = {"mma.sync": "warp", "v_mfma": "wave64", "v_wmma": "wave32"}
        return units.get(self.products, "warpgroup")

    @property
    def sums_in_half(self) -> bool:
        """Whether INT8 attention is to sum weights and values in float16."""
        return self.target in (86, 89, 120)

    @property
    def name(self) -> str:
        """As compilers spell it."""
        return self.target if isinstance(self.target, str) else f"sm_{self.target}"


CARDS = (
    Card(80, "Ampere, data centre", "A100, A30", 163, "mma.sync"),
    Card(86, "Ampere", "RTX 3090, A6000, A10", 99, "mma.sync"),
    Card(89, "Ada", "RTX 4090, L40S, L4", 99, "mma.sync"),
    Card(90, "Hopper", "H100, H200", 227, "wgmma"),
    Card(100, "Blackwell, data centre", "B200, GB200", 227, "tcgen05.mma"),
    Card(120, "Blackwell", "RTX 5090, RTX PRO 6000", 99, "mma.sync"),
    Card("gfx942", "CDNA 3", "MI300X", 64, "v_mfma"),
    Card("gfx1100", "RDNA 3", "RX 7900 XTX", 64, "v_wmma"),
)


def card(name: str) -> Card:
    """The card of a name such as ``sm_89`` or ``gfx942``."""
    return next(found for found in CARDS if found.name == name)
