"""BM25: find the sentences of a context that share the most telling words with a question.

    from data.bm25 import best
    best(["Mary went to the kitchen.", "It rained.", "John moved."], "Where is Mary?", k=1)  # [0]

The evaluation uses it for the row that the paper calls RAG. Writes nothing.
Source: Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond (2009).
"""

import math
import re
from collections import Counter

WORD = re.compile(r"\w+")


def best(
    sentences: list[str], question: str, k: int, k1: float = 1.5, b: float = 0.75
) -> list[int]:
    """The indices of the k sentences with the highest scores, in the order of the context.

    Of two equal scores the later sentence wins, because it is the fresher news.

    A sentence earns points for each word of the question that it holds. A word that few sentences
    hold earns more.

    k1  how much a repetition of a word adds: 0 for nothing, more for more
    b   how much a long sentence is marked down: 0 for not at all, 1 for fully"""
    asked = set(WORD.findall(question.lower()))
    lengths = []  # words in each sentence
    counts = []  # of each sentence: a word of the question -> how often it occurs there
    for sentence in sentences:
        words = WORD.findall(sentence.lower())
        lengths.append(len(words))
        counts.append(Counter(word for word in words if word in asked))
    n_sentences = len(sentences)
    mean_length = max(1.0, sum(lengths) / max(1, n_sentences))

    n_holders = Counter()  # a word of the question -> in how many sentences it occurs
    for count in counts:
        n_holders.update(count.keys())
    weights = {}
    for word, n in n_holders.items():
        weights[word] = math.log(1 + (n_sentences - n + 0.5) / (n + 0.5))

    scores = []
    for count, length in zip(counts, lengths, strict=True):
        dampening = k1 * (1 - b + b * length / mean_length)
        score = 0.0
        for word, n in count.items():
            score += weights[word] * n * (k1 + 1) / (n + dampening)
        scores.append(score)
    ranking = sorted(range(n_sentences), key=lambda i: (scores[i], i), reverse=True)
    return sorted(ranking[:k])
