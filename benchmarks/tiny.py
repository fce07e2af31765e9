"""Build a tiny model of any causal language model class of the installed transformers, by one mechanical recipe.

Sizes are set under the names that configurations use for them; whatever else a configuration holds stays at its default.
"""

import itertools
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY, WIDTH, LAYERS, POSITIONS = 120, 32, 2, 128
MOST_PARAMETERS = 3_000_000  # what is larger is not tiny: some size goes by a name that is not here
NAMES = [
    (VOCABULARY, "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input pronunciation_vocab_size"),
    (VOCABULARY, "shape_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base"),
    (WIDTH, "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim input_embedding_size"),
    (WIDTH, "output_embedding_size lru_width pronunciation_embed_dim shape_embed_dim ple_embed_dim backbone_hidden_size"),
    (WIDTH, "attention_hidden_size"),
    (2 * WIDTH, "intermediate_size ffn_dim dim_ff dff d_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim n_inner"),
    (2 * WIDTH, "feed_forward_size intermediate_size_mlp dense_intermediate_size mamba_d_ssm"),
    (16, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size"),
    (16, "shared_experts_intermediate_size moe_shared_expert_intermediate_size router_hidden_size q_lora_rank kv_lora_rank"),
    (16, "o_lora_rank hidden_size_per_layer_input laurel_rank adapter_rank hc_lowrank gated_norm_rank prompt_mid_dim"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers"),
    (LAYERS, "num_encoder_layers num_blocks"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads"),
    (4, "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads index_n_heads linear_num_heads"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk"),
    (2, "n_group topk_group num_expert_group n_groups zero_expert_num o_groups linear_num_key_heads mamba_n_groups"),
    (8, "head_dim qk_rope_head_dim v_head_dim qk_nope_head_dim index_head_dim swa_head_dim linear_key_head_dim dim_head"),
    (8, "linear_value_head_dim linear_head_dim kv_channels attention_head_size d_head time_step_rank mamba_dt_rank"),
    (8, "mamba_d_head mamba_head_dim mamba_n_heads mamba_num_heads n_mamba_heads state_size ssm_state_size mamba_d_state"),
    (16, "attention_head_dim mamba_headdim global_head_dim qk_head_dim"),
    (4, "rotary_dim"),
    (POSITIONS, "max_position_embeddings n_positions max_seq_len n_ctx model_max_length context_length max_target_positions"),
    (POSITIONS, "max_source_positions rel_extent"),
]
SIZES = {name: size for size, names in NAMES for name in names.split()}
# Names that mean one thing in one family and another in the next; where the first recipe fails, these are tried.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_group": 1, "topk_group": 1},
    {"head_dim": None},
    {"num_heads": 8, "n_groups": 1, "mamba_n_groups": 1},
    {"layer_types": ["full_attention"] * LAYERS},
    {"num_layers": None},
    {"num_key_value_heads": 4},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": 6},
    {"head_dim": 8},
    {"num_hidden_layers": 3, "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16},
    {"num_experts_per_tok": 1},
    {"num_kv_shared_layers": 0},
    {"is_decoder": True},
]


def classes() -> dict[str, tuple[type, type]]:
    """Return {model type: (configuration class, model class)}, each model class once."""
    found: dict[type, tuple[str, type]] = {}
    for configuration, model in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        name = configuration.model_type
        if model not in found or len(name) < len(found[model][0]):  # of several, the one that it is named after
            found[model] = (name, configuration)
    return {name: (configuration, model) for model, (name, configuration) in found.items()}


def sizes_of(configuration: type, variant: dict[str, Any]) -> dict[str, Any]:
    """Return what a configuration class is to be called with: the sizes that it knows, for its text part too."""
    config = configuration()
    sizes = {**SIZES, **variant}
    known: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name in variant and variant[name] is not None:
            known[name] = variant[name]
        elif name in sizes and isinstance(value, int | float):
            known[name] = sizes[name]
        elif name.endswith("token_id"):
            known[name] = None if name == "pad_token_id" and value is None else 0
        elif name == "use_cache":
            known[name] = False
        elif isinstance(value, dict) and name.endswith("_config") and hasattr(type(getattr(config, name)), "model_type"):
            known[name] = sizes_of(type(getattr(config, name)), variant)
    return {name: value for name, value in known.items() if value is not None}


def build(model_type: str, seed: int = 0, **options: Any) -> nn.Module:
    """Return a tiny model with random weights, also where they start at zero or one: these would hide mistakes.

    Raises:
        Exception: whatever the class says where the recipe does not fit it.
    """
    configuration, model_class = classes()[model_type]
    failures: list[Exception] = []
    for variant, of_text in itertools.product(VARIANTS, (False, True)):
        try:
            config = configuration(**{**sizes_of(configuration, variant), **options})
            config = config.get_text_config() if of_text else config
            with torch.device("meta"):
                count = sum(p.numel() for p in model_class(config).parameters())
            if count > MOST_PARAMETERS:
                raise ValueError(f"{count} parameters are not tiny")
            torch.manual_seed(seed)
            model = model_class(config).float().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
                logits = model(input_ids=torch.arange(2, 14).view(2, 6)).logits
            if logits.shape != (2, 6, VOCABULARY) or not logits.isfinite().all():
                raise ValueError(f"logits of shape {tuple(logits.shape)}, finite: {bool(logits.isfinite().all())}")
            return model
        except Exception as error:
            failures.append(error)
    raise failures[0]
