"""The exceptions that longspan raises for a request it cannot fulfil: what was asked, why not, and what is legal.

Every file may raise them; the command line prints one as a single line and exits with code 2. Knows nothing of other files.
"""


class LongspanError(Exception):
    """Base class of all of them; ``str(error)`` is one sentence that names the way out."""


class LayoutError(LongspanError, ValueError):
    """Numbers of tokens, heads and ranks for which there is no layout."""


class MaskError(LongspanError, ValueError):
    """A mask that is invalid, or whose length differs from that of the sequence."""


class KernelError(LongspanError, ValueError):
    """A kernel that is unknown, or that does not support an option, dtype or device of this attention."""


class BatchError(LongspanError, ValueError):
    """A batch that cannot be split over the ranks, or that differs between ranks."""


class ModelError(LongspanError, ValueError):
    """A model, or a state of it, that cannot be trained in parallel with these options."""


class DataError(LongspanError, ValueError):
    """A corpus or tokenizer that cannot be read, or a corpus that is too short."""


class RunError(LongspanError, ValueError):
    """A training or evaluation run that cannot start or continue: its settings, folder, disk, checkpoint or ranks."""


class LostRankError(RunError):
    """Another rank ended, or did not take part for longer than the process group waits. Raised by the ranks that are left."""
