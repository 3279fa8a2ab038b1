"""From texts on the disk to a rank's tokens of a step.

    corpora --Document--> tokenizers --ids--> packing (in the cache) --Split--> loader --part--> model(**part)
"""

from longspan.data.loader import Loader, part
from longspan.data.packing import Corpus, Split, bits, tokenize
from longspan.data.tokenizers import Tokenizer
from longspan.data.tokenizers import load as load_tokenizer

__all__ = ["Corpus", "Loader", "Split", "Tokenizer", "bits", "load_tokenizer", "part", "tokenize"]
