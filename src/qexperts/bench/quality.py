"""What quantizing does to a model's words: next-token distributions on a text, against those of a reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch

__all__ = ["Text", "compare_on", "read_text"]

WINDOW = 256  # tokens that are seen together
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as tokens.

    Attributes:
        name: of its file; "default" for the shipped one.
        tokenizer: "model", or "bytes" where the model has none: bytes modulo the vocabulary.
        ids: [tokens]; int64.
    """

    name: str
    tokenizer: str
    ids: torch.Tensor

    def prompt(self, tokens: int, batch: int) -> torch.Tensor:
        """[batch, tokens]: the text over and over, each sequence from another place."""
        count = len(self.ids)
        starts = torch.arange(batch)[:, None] * (count // batch)
        return self.ids[(starts + torch.arange(tokens)) % count]


def read_text(file: str | None, model: Path, vocabulary: int) -> Text:
    """A text file, or the shipped text, in the tokens of the model at a path.

    Raises: ValueError for a file without text; OSError for one that cannot be read.
    """
    if file is None:
        data = (resources.files("qexperts") / "data" / "text.txt").read_bytes()
    else:
        data = Path(file).read_bytes()
    name = "default" if file is None else Path(file).name
    if any((model / found).exists() for found in _TOKENIZER_FILES):
        from transformers import AutoTokenizer

        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text)["input_ids"], dtype=torch.long)
        tokenizer = "model"
    else:
        ids, tokenizer = torch.tensor(list(data), dtype=torch.long) % vocabulary, "bytes"
    if len(ids) < 2:
        raise ValueError(f"--text {file}: {len(ids)} tokens; expected at least 2")
    return Text(name, tokenizer, ids)


@torch.no_grad()
def compare_on(
    ids: torch.Tensor, reference: Callable[[torch.Tensor], Any], others: list[Callable[[torch.Tensor], Any]]
) -> list[tuple[float, float]]:
    """How far next-token distributions lie from those of a reference, on the same tokens.

        kl = mean over positions of sum_v p(v) (log p(v) - log q(v))        p: reference, q: other, in nats, in fp32

    Args:
        ids: [tokens] on the device of the models; taken in windows of `WINDOW`, which do not see each other.
        reference, others: [1, T] -> logits [1, T, vocabulary].
    Returns: kl and the share of positions with the same likeliest token, of each other.
    """
    sums, same = [0.0] * len(others), [0] * len(others)
    for window in ids.split(WINDOW):
        log_p = reference(window[None])[0].float().log_softmax(-1)
        p, likeliest = log_p.exp(), log_p.argmax(-1)
        for i, other in enumerate(others):
            log_q = other(window[None])[0].float().log_softmax(-1)
            sums[i] += float((p * (log_p - log_q)).sum(-1).double().sum())
            same[i] += int((log_q.argmax(-1) == likeliest).sum())
    return [(total / len(ids), count / len(ids)) for total, count in zip(sums, same, strict=True)]
