"""The exceptions that longspan raises for a request it cannot fulfil: what was asked, why not, and what is legal.

Any file of the package may raise them; the command line prints one as a single line and exits with code 2.
"""


class LongspanError(Exception):
    """Base class of every error that longspan raises on purpose; its text is one sentence that names a legal alternative."""


class LayoutError(LongspanError, ValueError):
    """The numbers of tokens, heads and ranks do not fit one another: no partition over the ranks exists for them."""


class MaskError(LongspanError, ValueError):
    """A mask cannot be made of its arguments, does not fit the length of the sequence, or cannot be combined with a layer's."""


class KernelError(LongspanError, ValueError):
    """A kernel name is unknown, or the kernel does not support an option, dtype or device of this attention."""


class BatchError(LongspanError, ValueError):
    """A batch cannot be split over the ranks, or differs between ranks that must pass the same one."""


class ModelError(LongspanError, ValueError):
    """A model, or the state that it is in, cannot be trained in parallel with these options."""


class DataError(LongspanError, ValueError):
    """A corpus or tokenizer cannot be read, or a corpus is too short."""


class RunError(LongspanError, ValueError):
    """A training or evaluation run cannot start or continue, because of its settings, folder, disk, checkpoint or ranks."""


class LostRankError(RunError):
    """Another rank ended, or did not take part within the timeout of the process group. Raised by the ranks that are left."""
