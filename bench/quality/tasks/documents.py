"""Questions over documents: ``qa_1`` and ``qa_2`` of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3.4).

What a question needs is mixed with documents of other questions. RULER takes SQuAD for one document to a question and
HotpotQA for several; here the user's file decides.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice

from rdkv.runtime.errors import ConfigError

from .questions import Question
from .sample import Draft, Recipe, Request


def single_document(request: Request) -> Recipe:
    """A question that one document answers."""
    return _among([q for q in request.source.questions if len(q.documents) == 1], "one document", request)


def multi_document(request: Request) -> Recipe:
    """A question that needs several documents."""
    return _among([q for q in request.source.questions if len(q.documents) > 1], "several documents", request)


def _among(questions: list[Question], kind: str, request: Request) -> Recipe:
    """The recipe of one question that fits the length; samples of one seed take different ones while there are any."""
    if not questions:
        raise ConfigError(f"the source has no question over {kind}: give a file that has, or leave this task out")
    random.Random(request.order).shuffle(questions)
    fits = (q for q in questions if request.count(_draft(q, q.documents)) <= request.length)
    fitting = list(islice(fits, request.index + 1))
    if not fitting:
        raise ConfigError(f"no question over {kind} fits {request.length} tokens with its documents: ask for more")
    return _mix(fitting[request.index % len(fitting)], request)


def _mix(question: Question, request: Request) -> Recipe:
    """The question's documents, all whole, among words of distractors; only the last distractor may be cut.

    Distractors are first those that come with the question, then documents of other questions.
    """
    draw, own = request.draw, {*question.documents, *question.distractors}
    pool = [document for document in request.source.documents if document not in own]
    distractors = [*draw.sample(question.distractors, len(question.distractors)), *draw.sample(pool, len(pool))]
    ranks = [draw.random() for _ in range(len(question.documents) + len(distractors))]
    lengths = [len(distractor.split()) for distractor in distractors]

    def build(units: int) -> Draft:
        documents = list(question.documents)
        for distractor, length in zip(distractors, lengths, strict=True):
            if units <= 0:
                break
            documents.append(distractor if length <= units else " ".join(distractor.split()[:units]))
            units -= length
        return _draft(question, [text for _, text in sorted(zip(ranks, documents, strict=False))])

    return Recipe(build, most=sum(lengths))


def _draft(question: Question, documents: Sequence[str]) -> Draft:
    """The question over numbered documents."""
    text = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1))
    intro = "Read the documents below. A question about them follows.\n\n"
    asked = f"\n\nAnswer in a few words and without explanation. {question.text}"
    return Draft(intro + text, asked, "\nAnswer:", question.answers)
