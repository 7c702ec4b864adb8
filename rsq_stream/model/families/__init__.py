"""The families of decoders that are supported, one file each."""

from rsq_stream.model.families.base import STAGES, Family

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "Llama",
            "LlamaForCausalLM",
            bias_options=("attention_bias", "mlp_bias"),
        ),
        Family("mistral", "Mistral", "MistralForCausalLM"),
        Family("qwen2", "Qwen2", "Qwen2ForCausalLM", biases=STAGES[0].linears),
        Family(
            "qwen3",
            "Qwen3",
            "Qwen3ForCausalLM",
            bias_options=("attention_bias",),
            head_norms=True,
        ),
    )
}
