"""The task caption: CIDEr-D (arXiv 1411.5726) and BLEU-4 (ACL P02-1040), as COCO's caption evaluation computes them.

Both are computed by pycocoevalcap, the evaluation program of COCO's captions (arXiv 1504.00325), on words of our own:
lower case, with spaces for punctuation marks and symbols of any script. The program's own tokenizer needs Java, and
makes other words of contractions and numbers ("isn't", "2.5"). So figures compare with each other, and with those of
papers roughly, not to the digit. Texts of scripts that write no spaces are not split.

CIDEr-D weighs runs of one to four words by how few records have them in a reference. So it depends on the set that is
scored: figures of two sets, or of parts of one, do not compare. What occurs in every record weighs nothing: a set of
one record scores 0, whatever is answered, and a warning says so.
"""

from __future__ import annotations

import dataclasses
import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from finetune.evaluation.answer import Answer
from finetune.evaluation.score import Score, mean_score, normal_interval, require_answered

if TYPE_CHECKING:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

HIGHEST = 10.0  # of CIDEr-D
Texts = dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class CaptionTask:
    """Captions of images, each judged by all right answers of its record, its references. The metric is CIDEr-D times
    100, as papers give it: 0 to 1000, the best networks near 150 on COCO.
    """

    name: str = "caption"
    key: str = "cider"
    metric: str = "CIDEr-D"
    unit: str = "times 100"
    value: None = None  # the words of an answer weigh by the other records that are scored with it

    def require(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        """See `Task.require`: pycocoevalcap, and words in every reference."""
        program()
        for record in records:
            if wordless := [text for text in record["answers"] if not words(text)]:
                raise ValueError(
                    f"{wordless[0]!r:.100}, a right answer to {record['id']!r}, has no words that a caption could be "
                    "scored by: correct it, or remove it"
                )

    def score(self, answers: Mapping[str, Answer], records: Iterable[Mapping[str, Any]]) -> Score:
        """See `Task.score`. An answer is worth its own CIDEr-D, and the metric is their mean. The interval is a normal
        approximation, by image, which takes the weights of words as given.
        """
        records = list(records)
        require_answered(answers, records)
        self.require(records)
        if len(records) == 1:
            warnings.warn("CIDEr-D of a single record is 0, whatever is answered: score more of them", stacklevel=2)
        references = {record["id"]: [" ".join(words(text)) for text in record["answers"]] for record in records}
        written = {record["id"]: [" ".join(words(answers[record["id"]].text))] for record in records}
        values = cider_d(references, written)
        found = mean_score(self.metric, values, records, self.unit, normal_interval(HIGHEST))
        return dataclasses.replace(found, others={"BLEU-4": 100 * bleu_4(references, written)})


def words(text: str) -> list[str]:
    """The words of a text: in lower case, without punctuation marks and symbols (Unicode's categories P and S)."""
    return "".join(" " if unicodedata.category(mark)[0] in "PS" else mark for mark in text.lower()).split()


def cider_d(references: Texts, written: Texts) -> dict[str, float]:
    """CIDEr-D of each caption by its id, 0 to 10. Texts are words between spaces; one is written for each id."""
    cider, _ = program()
    _, values = cider().compute_score(references, written)
    return dict(zip(references, map(float, values), strict=True))


def bleu_4(references: Texts, written: Texts) -> float:
    """BLEU with runs of one to four words of all captions together, 0 to 1, by the length of the closest reference."""
    _, bleu = program()
    (*_, of_four), _ = bleu(4).compute_score(references, written, verbose=0)
    return float(of_four)


def program() -> tuple[type[Cider], type[Bleu]]:
    """What computes both. ValueError where it is not installed."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ValueError(
            "scoring captions needs pycocoevalcap: pip install 'pycocoevalcap>=1.2,<2', or pip install --editable "
            "'.[caption]' in the checkout; or judge answers by another task (data.validation.task)"
        ) from error
    return Cider, Bleu
