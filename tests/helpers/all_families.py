"""Names of the families of models that are tested."""

DENSE = [
    *("gpt2", "gpt_neox", "llama", "llama, tied embeddings", "olmo2", "mistral", "qwen2", "qwen3", "gemma2", "opt"),
    *("phi3", "gpt_neo", "gptj", "falcon", "stablelm", "bloom", "exaone4", "gemma3_text", "glm4", "mpt", "nemotron"),
    *("phi", "starcoder2", "gpt_bigcode"),
]


EXPERTS = ["mixtral", "qwen3_moe"]
