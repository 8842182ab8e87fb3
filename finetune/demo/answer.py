"""One question asked of one network: the answer, and each token's probability. Not here: the boxes that an answer names
(data/boxes.py, data/drawing.py).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from data.images import ImageSource
from finetune.demo.networks import Network


class Token(NamedTuple):
    """A token as text, and the probability that the network gave it, at temperature 1."""

    text: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Answered:
    """An answer; `ids` and `tokens` hold `<eos>` too, unless it was cut off (`finished` is False)."""

    text: str
    ids: list[int]
    tokens: list[Token]
    finished: bool


def ask(
    network: Network,
    image: ImageSource,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Answered:
    """The answer to a whole prompt, such as `answer en what is this?`; sampling as in `PaliGemma.generate_scored`.

    Raises:
        ValueError: the image cannot be used, the prompt is too long or holds a special token, or a sampling setting is
            outside its range.
    """
    processor = network.processor
    inputs: dict[str, Any] = {
        name: tensor.to(network.model.device) for name, tensor in processor([image], [prompt]).items()
    }
    new = network.model.generate_scored(
        **inputs, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    ((ids, log_probs),) = new.rows(processor.eos_id)
    tokens = [Token(processor.token_text(i), math.exp(p)) for i, p in zip(ids, log_probs, strict=True)]
    return Answered(processor.decode(ids), ids, tokens, ids[-1] == processor.eos_id)
