"""Replicas of encoders, whose classifiers have several modules after the first token or the mean of all tokens."""

import torch
from replicas import D, Replica, row


def _gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def _pooled(states, text, tensors, config):
    x = _gelu(tensors["pooler.dense.weight"] @ states[0] + tensors["pooler.dense.bias"])
    return tensors["classifier.weight"] @ x + tensors["classifier.bias"]


def _bert(states, text, tensors, config):
    x = torch.tanh(tensors["bert.pooler.dense.weight"] @ states[0] + tensors["bert.pooler.dense.bias"])
    return tensors["classifier.weight"] @ x + tensors["classifier.bias"]


def _modern(states, text, tensors, config):
    state = states.mean(0) if config["classifier_pooling"] == "mean" else states[0]
    x = _gelu(tensors["head.dense.weight"] @ state)
    x = (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt() * tensors["head.norm.weight"]
    return tensors["classifier.weight"] @ x + tensors["classifier.bias"]


def _dense_and_classifier(dense, rows=1):
    def make(draw):
        return row(dense, rows=D)(draw) | row("classifier", rows=rows)(draw)

    return make


def _modern_tensors(draw):
    norm = {"head.norm.weight": 1 + 0.3 * draw(D)}
    return row("head.dense", rows=D, bias=False)(draw) | norm | row("classifier")(draw)


_DEBERTA = {
    "architectures": ["DebertaV2ForSequenceClassification"],
    "num_labels": 1,
    "pooler_hidden_size": D,
    "pooler_hidden_act": "gelu",
}
_MODERN = {"architectures": ["ModernBertForSequenceClassification"], "num_labels": 1}
ENCODERS = [
    Replica(
        "encoder",
        "reward-model-deberta-v3-base, -large, -large-v2 (one text)",
        _pooled,
        _dense_and_classifier("pooler.dense"),
        body="deberta-v2",
        prefix="deberta.",
        fields=_DEBERTA,
    ),
    Replica(
        "encoder, two segments",
        "BERT classifiers of prompt and response; reward-model-deberta-v3 as on its card",
        _bert,
        _dense_and_classifier("bert.pooler.dense", rows=2),
        body="bert",
        prefix="bert.",
        fields={"architectures": ["BertForSequenceClassification"], "num_labels": 2},
        options={"output": (1, 0), "two_segments": True},
        chosen=(1, 0),
        segments=True,
    ),
    Replica(
        "encoder with a norm, first token",
        "ModernBERT classifiers",
        _modern,
        _modern_tensors,
        body="modernbert",
        fields=_MODERN | {"classifier_pooling": "cls"},
    ),
    Replica(
        "encoder with a norm, mean of tokens",
        "ModernBERT classifiers with classifier_pooling 'mean'",
        _modern,
        _modern_tensors,
        body="modernbert",
        fields=_MODERN | {"classifier_pooling": "mean"},
    ),
]
