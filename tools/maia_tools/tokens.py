"""Text to token ids, as all-MiniLM-L6-v2 was trained on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maia_rt.errors import Unsupported

MAX_TOKENS = 256
"""What the model takes, the two marks around a text included; the rest of a text is left out."""


@dataclass(frozen=True)
class Sentence:
    """A text, its token ids (int32), and whether it had more of them than the model takes."""

    text: str
    ids: np.ndarray
    truncated: bool


class Tokenizer:
    """The model's WordPiece tokenizer.

    Parameters
    ----------
    folder : Path
        From `maia_tools.weights.locate`.

    Raises
    ------
    Unsupported
        ``tokenizers`` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise Unsupported("tokenizers is not installed", hint="python -m pip install 'maia-rt[demo]'") from error
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)

    def tokenize(self, texts: Iterable[str]) -> list[Sentence]:
        """Token ids of each text, in order.

        Any ``str`` will do: a surrogate without its partner, which no encoding can carry, counts as U+FFFD.
        """
        sentences = []
        for text in texts:
            # One by one: the library's own batches would start threads that outlive them.
            encoding = self._tokenizer.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
            sentences.append(Sentence(text, np.array(encoding.ids, np.int32), bool(encoding.overflowing)))
        return sentences
