"""BM25: rank the sentences of a context by the words they share with a question, as the paper's RAG rows do.

    from data.bm25 import best
    best(["Mary went to the kitchen.", "It rained.", "John moved."], "Where is Mary?", k=1)    # [0]

Writes nothing. Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond (2009).
"""
import math
import re
from collections import Counter

WORD = re.compile(r"\w+")


def best(sentences: list[str], question: str, k: int, k1: float = 1.5, b: float = 0.75) -> list[int]:
    """Indices of the k best sentences, in their own order; of equals the later one, the fresher news.

    k1 is how soon a repeated word stops counting, b how much long sentences are marked down."""
    query = set(WORD.findall(question.lower()))
    lengths, counts = [], []
    for sentence in sentences:
        words = WORD.findall(sentence.lower())
        lengths.append(len(words))
        counts.append(Counter(w for w in words if w in query))
    n, mean = len(sentences), max(1.0, sum(lengths) / max(1, len(sentences)))
    holders = Counter(w for c in counts for w in c)
    idf = {w: math.log(1 + (n - m + 0.5) / (m + 0.5)) for w, m in holders.items()}
    scores = [sum(idf[w] * m * (k1 + 1) / (m + k1 * (1 - b + b * size / mean)) for w, m in c.items())
              for c, size in zip(counts, lengths)]
    order = sorted(range(n), key=lambda i: (scores[i], i), reverse=True)
    return sorted(order[:k])
