"""Replicas of the kinds that a language model computes: logits, and log-probabilities of responses."""

import torch
from replicas import Replica

from rmtension.heads import LogRatioHead


def _token_logit(*tokens):
    def forward(states, text, tensors, config):
        logits = tensors["lm_head.weight"] @ states[-1]
        first, *second = tokens
        return (logits[first] - logits[second[0]] if second else logits[first])[None]

    return forward


def _capped(states, text, tensors, config):
    cap = config["final_logit_softcapping"]
    logits = torch.tanh(tensors["lm_head.weight"] @ states[-1] / cap) * cap
    return (logits[40] - logits[41])[None]


def _log_likelihood(beta=1.0, average=False):
    """beta times the sum or mean over the response of log p(token | before)."""

    def forward(states, text, tensors, config):
        logits = states @ tensors["lm_head.weight"].T
        terms = []
        for at in range(text.first, len(text.ids)):
            before = logits[at - 1]
            terms.append(before[text.ids[at]] - before.exp().sum().log())
        total = torch.stack(terms).sum()
        return (beta * total / (len(terms) if average else 1))[None]

    return forward


def _next_token(states, text, tensors, config):
    logits = tensors["lm_head.weight"] @ states[text.first - 1]
    return (logits[text.ids[text.first]] - torch.logsumexp(logits, 0))[None]


def _nothing(draw):
    return {}


_LANGUAGE_MODEL = {"architectures": ["LlamaForCausalLM"]}
TOKENS = [
    Replica(
        "logit of one token",
        "Llama-3.1-Nemotron-70B-Reward-HF",
        _token_logit(0),
        _nothing,
        fields=_LANGUAGE_MODEL,
        unembedding=True,
        options={"output": 0},
        reopened={},
        as_classifier=True,
    ),
    Replica(
        "capped logits of two tokens",
        "judges with a Gemma-2 body",
        _capped,
        _nothing,
        body="gemma2",
        fields={
            "architectures": ["Gemma2ForCausalLM"],
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
        },
        unembedding=True,
        options={"output": ("Yes", "No")},
    ),
    Replica(
        "logits of two tokens",
        "yes/no judges, pair-preference-model-LLaMA3-8B",
        _token_logit(40, 41),
        _nothing,
        fields=_LANGUAGE_MODEL,
        unembedding=True,
        options={"output": ("Yes", "No")},
        reopened={},
        as_classifier=True,
    ),
    Replica(
        "log-ratio of two language models",
        "models trained by DPO, with their reference",
        _log_likelihood(beta=0.1),
        _nothing,
        fields=_LANGUAGE_MODEL,
        unembedding=True,
        head=lambda folder: LogRatioHead(folder / "reference", beta=0.1),
        minus=Replica(
            "reference of DPO",
            "",
            _log_likelihood(beta=0.1),
            _nothing,
            body="mistral",
            fields={"architectures": ["MistralForCausalLM"]},
            unembedding=True,
        ),
    ),
    Replica(
        "log-likelihood, averaged",
        "models trained by SimPO; DPO without a reference",
        _log_likelihood(beta=2.5, average=True),
        _nothing,
        fields=_LANGUAGE_MODEL,
        unembedding=True,
        head=lambda folder: LogRatioHead(beta=2.5, average=True),
    ),
    Replica(
        "next token",
        "language models, with responses of one token",
        _next_token,
        _nothing,
        body="mistral",
        fields={"architectures": ["MistralForCausalLM"]},
        unembedding=True,
        head=lambda folder: LogRatioHead(),
        one_token=True,
    ),
]
