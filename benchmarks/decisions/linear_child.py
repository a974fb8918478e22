"""A linear classifier on TF-IDF, run by the interpreter of scikit-learn's own environment.

Standard input has a JSON document with the texts and answers, and standard output gets the probabilities. TF-IDF
is of words and pairs of words, and of up to 5 letters within a word. The regularization that suits the validation
rows best is used.
"""

import json
import sys

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline, make_union

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)


def main() -> None:
    """Train, and write the probabilities of all options for the validation rows and the test rows."""
    given = json.load(sys.stdin)
    train, validation, test = given["train"], given["validation"], given["test"]
    options = range(given["num_options"])
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 5), sublinear_tf=True)
    found = []
    for strength in STRENGTHS:
        model = make_pipeline(make_union(words, letters), LogisticRegression(C=strength, max_iter=5000))
        model.fit(train["texts"], train["answers"])
        known = list(model.classes_)
        loss = log_loss(validation["answers"], _all(model, known, options, validation["texts"]), labels=options)
        found.append((loss, strength, model, known))
    _, strength, model, known = min(found, key=lambda one: one[:2])
    probabilities = [_all(model, known, options, part["texts"]) for part in (validation, test)]
    json.dump({"probabilities": probabilities, "settings": f"C = {strength:g}"}, sys.stdout)


def _all(model: Pipeline, known: list[int], options: range, texts: list[str]) -> list[list[float]]:
    """Return the probabilities of all options. Those without a training row have almost none."""
    found = model.predict_proba(texts)
    return [[float(row[known.index(one)]) if one in known else 1e-6 for one in options] for row in found]


if __name__ == "__main__":
    main()
