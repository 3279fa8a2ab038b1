"""``longspan rehearse``: one rank of a large world on the device at hand, measured beside what the plan says of it.

    --world 64 --ulysses 8 ...   ->   rank 0 of 64, then a rank of each other kind of pipeline stage
                                      real kernels, real allocations, no network      ->   compute time, memory   |   the plan's

It starts no ranks. What it cannot cover (network, waiting, communicator buffers, fragmentation over days) the output names.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from tyro.conf import arg

from longspan.cli.config import LARGEST_SEED, legal_model
from longspan.cli.output_file import refuse_no_file
from longspan.errors import RunError
from longspan.memory.options import MemoryOptions


def _optional(hint: str, metavar: str = "INT") -> object:
    """A tyro annotation of a setting whose default is None: ``--help`` shows its type and ``(default: {hint})``."""
    return arg(help_behavior_hint=f"(default: {hint})", metavar=metavar)


@dataclass(frozen=True)
class RehearseSettings:
    """Settings of a rehearsal."""

    world: int = 64
    """Ranks of the world of which one is rehearsed."""
    model: str = "tiny"
    """tiny, small, llama-1b, llama-8b or llama-70b: a decoder of that shape. hf:FOLDER: the Hugging Face model in FOLDER."""
    tokens: int = 8_192
    """Tokens of one sequence (the context length)."""
    rows: Annotated[int | None, _optional("one for each data replica")] = None
    """Sequences of one optimizer step (the global batch size), over all data replicas and micro-batches."""
    micro_batches: Annotated[int | None, _optional("the pipeline degree")] = None
    """Micro-batches whose gradients are accumulated in one optimizer step."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype of forward and backward: auto is bf16 on a GPU, else fp32. Parameters and optimizer states are fp32."""
    pipeline: int = 1
    """Degree of pipeline parallelism: the layers are split over ranks."""
    ring: int = 1
    """Degree of ring attention (context parallelism): key/value blocks pass from rank to rank."""
    ulysses: int = 1
    """Degree of Ulysses sequence parallelism: an all-to-all turns shards of tokens into shards of heads around attention."""
    tensor: int = 1
    """Degree of tensor parallelism: heads and feed-forwards are split over ranks."""
    zero: Literal[0, 2, 3] = 0
    """ZeRO stage (FSDP2). 0: nothing is sharded. 2: gradients and optimizer states are sharded; 3: parameters too."""
    recompute: Literal["none", "full", "selective"] = "none"
    """What a block computes again in its backward instead of keeping it: nothing, everything, or all but attention."""
    tile_tokens: Annotated[int | None, _optional("all")] = None
    """Tokens that feed-forwards and norms work on at a time, forward and backward."""
    head_chunks: int = 1
    """Number of chunks of a rank's heads that are exchanged and attended one after the other."""
    offload_activations: bool = False
    """Keep in host memory what blocks save for their backward (on a GPU)."""
    offload_parameters: bool = False
    """With zero=2 and 3, keep parameter shards and optimizer states in host memory."""
    chunked_loss: bool = False
    """Compute the loss of a hf: model without forming all logits. (Our decoder never forms them.)"""
    rank: Annotated[int | None, _optional("the fullest rank of each kind of pipeline stage")] = None
    """Rehearse this rank alone."""
    steps: int = 3
    """Timed optimizer steps, whose median counts. A step before them and, on a CPU, one that records memory are not timed."""
    hardware: Annotated[str | None, _optional("none: the plan then has memory, but no times", "NAME")] = None
    """What the plan is for: a name as longspan plan takes it, or a .json file that longspan probe wrote."""
    json: Annotated[str | None, _optional("none", "FILE")] = None
    """File for the measured and predicted numbers."""
    seed: int = 0
    """Seed of the token ids."""
    debug: bool = False
    """Show the traceback of an error beside its message."""

    def __post_init__(self) -> None:
        legal_model(self.model)
        names = (
            "world",
            "rows",
            "micro_batches",
            "pipeline",
            "ring",
            "ulysses",
            "tensor",
            "tile_tokens",
            "head_chunks",
            "steps",
        )
        for name in (*names, "tokens"):
            value, least = getattr(self, name), 2 if name == "tokens" else 1
            if value is not None and value < least:
                raise RunError(f"{name}={value} must be at least {least}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise RunError(f"seed={self.seed} must be at least 0 and at most {LARGEST_SEED}")
        product = self.pipeline * self.ring * self.ulysses * self.tensor
        if self.world % product:
            raise RunError(
                f"pipeline x ring x ulysses x tensor = {product} does not divide the world of {self.world} ranks; the product "
                f"may be {', '.join(str(d) for d in range(1, self.world + 1) if self.world % d == 0)}"
            )
        if self.rank is not None and not 0 <= self.rank < self.world:
            raise RunError(f"rank={self.rank} is not in the world of {self.world} ranks; legal are 0 to {self.world - 1}")
        if self.batch % self.data or self.batch // self.data % self.parts:
            raise RunError(
                f"{self.batch} rows cannot be divided over data={self.data} replicas in {self.parts} micro-batches; use a "
                f"multiple of {self.data * self.parts} rows"
            )
        if self.offload_parameters and not self.zero:
            raise RunError("offload_parameters needs sharded parameters; use --zero 2 or --zero 3")
        refuse_no_file("json", self.json)

    @property
    def data(self) -> int:
        """The data degree: what the other degrees leave of the world."""
        return self.world // (self.pipeline * self.ring * self.ulysses * self.tensor)

    @property
    def parts(self) -> int:
        """Micro-batches of a step."""
        return self.micro_batches or self.pipeline

    @property
    def batch(self) -> int:
        """Rows of a step over all replicas."""
        return self.rows or self.data * self.parts

    @property
    def memory(self) -> MemoryOptions:
        """The fields of MemoryOptions among these settings, for ``parallelize(memory=)``."""
        return MemoryOptions(**{option.name: getattr(self, option.name) for option in fields(MemoryOptions)})


def work(settings: RehearseSettings) -> int:
    """Rehearse each chosen rank and print what was measured beside the plan.

    Returns:
        The exit code 0.

    Raises:
        LongspanError: settings that the model or the layout cannot have.
    """
    from longspan.cli.rehearsal import rehearse

    return rehearse(settings)
