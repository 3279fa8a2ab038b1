"""The few exceptions a user can meet. Each text says what was asked, why it cannot be, and what is legal.

Knows nothing of the rest: every other file may raise these, and the command line turns each into one line and exit code 2.
"""


class LongspanError(Exception):
    """What every refusal of longspan derives from; ``str(error)`` is one sentence a user can act on."""


class LayoutError(LongspanError, ValueError):
    """Tokens, heads or ranks that no layout can hold together."""


class MaskError(LongspanError, ValueError):
    """A mask that cannot be read as bands, or does not fit the tokens it is asked for."""


class KernelError(LongspanError, ValueError):
    """A kernel that is unknown, or lacks what this attention asks of it."""


class BatchError(LongspanError, ValueError):
    """A batch that cannot be cut, or ranks that were given different ones."""


class ModelError(LongspanError, ValueError):
    """A model, or a state of it, that cannot be trained in parallel as asked."""


class DataError(LongspanError, ValueError):
    """A corpus or tokenizer that cannot be read, or text that is too short."""


class RunError(LongspanError, ValueError):
    """A run that cannot start or go on: its settings, its folder, its disk, its checkpoint, its ranks."""
