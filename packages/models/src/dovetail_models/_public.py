"""The public names, which the package imports when the first one is asked for."""

from dovetail_models.adapter import Adapter, Lora, stack_lora
from dovetail_models.adapter_slots import lora_of, swap_lora, with_lora
from dovetail_models.bert import BertConfig, BertForMaskedLM, BertMaskedLMConfig, BertModel
from dovetail_models.config_parts import LayerWindowsConfig, PartlyTurnedConfig, WindowConfig
from dovetail_models.conversion import convert
from dovetail_models.decoder import Block, Decoder, DecoderConfig, StackConfig
from dovetail_models.deepseek_v2 import DeepseekV2, DeepseekV2Config
from dovetail_models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from dovetail_models.depth import prune_layers, repeat_layers
from dovetail_models.description import Description, ParameterGroup, describe
from dovetail_models.encoder import EncoderConfig
from dovetail_models.family import FAMILIES, Family
from dovetail_models.gemma2 import Gemma2, Gemma2Config
from dovetail_models.gemma3 import Gemma3, Gemma3Config
from dovetail_models.gemma3_multimodal import Gemma3Multimodal, Gemma3MultimodalConfig
from dovetail_models.glm4_moe import Glm4Moe, Glm4MoeConfig
from dovetail_models.gpt2 import Gpt2, Gpt2Config
from dovetail_models.gpt_oss import GptOss, GptOssConfig
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_fields import ConfigError
from dovetail_models.hf_rules import attention_rules, decoder_rules, expert_rules, mlp_rules, outer_rules
from dovetail_models.hub import HubError
from dovetail_models.huggingface import config_from_hf, config_to_hf, from_pretrained, save_pretrained, weight_map
from dovetail_models.layers import MLP, GatedMLP, GroupedAttention, LayerNorm, RMSNorm, Rotary
from dovetail_models.layout import stacked, unstacked
from dovetail_models.lazy_model import LazyModel, lazy, surgery
from dovetail_models.lazy_parts import elementwise
from dovetail_models.llama import Llama, LlamaConfig
from dovetail_models.lora import LORA, add_lora, remove_lora
from dovetail_models.lora_merge import merge_lora
from dovetail_models.mamba2 import Mamba2, Mamba2Config
from dovetail_models.merging import merge_models
from dovetail_models.mistral import Mistral, MistralConfig
from dovetail_models.mixtral import Mixtral, MixtralConfig
from dovetail_models.moe import Experts, SparseConfig, SparseMLP, sparse_mlp
from dovetail_models.mup import maximal_update
from dovetail_models.olmo2 import Olmo2, Olmo2Config
from dovetail_models.olmo3 import Olmo3, Olmo3Config
from dovetail_models.peft import load_lora, save_lora
from dovetail_models.phi3 import Phi3, Phi3Config
from dovetail_models.prunable import output_norms, strongest
from dovetail_models.pruning import prune_experts, prune_heads, prune_hidden
from dovetail_models.qwen2 import Qwen2, Qwen2Config
from dovetail_models.qwen3 import Qwen3, Qwen3Config
from dovetail_models.qwen3_moe import Qwen3Moe, Qwen3MoeConfig
from dovetail_models.qwen3_next import Qwen3Next, Qwen3NextConfig
from dovetail_models.remat import ACTIVATIONS, POLICIES, Remat
from dovetail_models.router import Router, Selection, SparseTraining
from dovetail_models.siglip import (
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from dovetail_models.smollm3 import SmolLM3, SmolLM3Config
from dovetail_models.stack import Stack
from dovetail_models.state import abstract, init, logical_axes, merge, placements, split
from dovetail_models.t5_encoder import T5EncoderConfig, T5EncoderModel
from dovetail_models.upcycling import upcycle
from dovetail_models.vit import ViTClassifierConfig, ViTConfig, ViTForImageClassification, ViTModel
from dovetail_models.vocabulary import resize_vocabulary
from dovetail_models.widening import widen

__all__ = [
    "ACTIVATIONS",
    "FAMILIES",
    "LORA",
    "MLP",
    "POLICIES",
    "Adapter",
    "BertConfig",
    "BertForMaskedLM",
    "BertMaskedLMConfig",
    "BertModel",
    "Block",
    "ConfigError",
    "ConfigMap",
    "Decoder",
    "DecoderConfig",
    "DeepseekV2",
    "DeepseekV2Config",
    "DeepseekV3",
    "DeepseekV3Config",
    "Description",
    "EncoderConfig",
    "Experts",
    "Family",
    "Fields",
    "GatedMLP",
    "Gemma2",
    "Gemma2Config",
    "Gemma3",
    "Gemma3Config",
    "Gemma3Multimodal",
    "Gemma3MultimodalConfig",
    "Glm4Moe",
    "Glm4MoeConfig",
    "Gpt2",
    "Gpt2Config",
    "GptOss",
    "GptOssConfig",
    "GroupedAttention",
    "HubError",
    "LayerNorm",
    "LayerWindowsConfig",
    "LazyModel",
    "Llama",
    "LlamaConfig",
    "Lora",
    "Mamba2",
    "Mamba2Config",
    "Mistral",
    "MistralConfig",
    "Mixtral",
    "MixtralConfig",
    "Olmo2",
    "Olmo2Config",
    "Olmo3",
    "Olmo3Config",
    "ParameterGroup",
    "PartlyTurnedConfig",
    "Phi3",
    "Phi3Config",
    "Qwen2",
    "Qwen2Config",
    "Qwen3",
    "Qwen3Config",
    "Qwen3Moe",
    "Qwen3MoeConfig",
    "Qwen3Next",
    "Qwen3NextConfig",
    "RMSNorm",
    "Remat",
    "Rotary",
    "Router",
    "Selection",
    "SiglipConfig",
    "SiglipModel",
    "SiglipTextConfig",
    "SiglipTextModel",
    "SiglipVisionConfig",
    "SiglipVisionModel",
    "SmolLM3",
    "SmolLM3Config",
    "SparseConfig",
    "SparseMLP",
    "SparseTraining",
    "Stack",
    "StackConfig",
    "T5EncoderConfig",
    "T5EncoderModel",
    "ViTClassifierConfig",
    "ViTConfig",
    "ViTForImageClassification",
    "ViTModel",
    "WindowConfig",
    "abstract",
    "add_lora",
    "attention_rules",
    "config_from_hf",
    "config_to_hf",
    "convert",
    "decoder_rules",
    "describe",
    "elementwise",
    "expert_rules",
    "from_pretrained",
    "init",
    "lazy",
    "load_lora",
    "logical_axes",
    "lora_of",
    "maximal_update",
    "merge",
    "merge_lora",
    "merge_models",
    "mlp_rules",
    "outer_rules",
    "output_norms",
    "placements",
    "prune_experts",
    "prune_heads",
    "prune_hidden",
    "prune_layers",
    "remove_lora",
    "repeat_layers",
    "resize_vocabulary",
    "save_lora",
    "save_pretrained",
    "sparse_mlp",
    "split",
    "stack_lora",
    "stacked",
    "strongest",
    "surgery",
    "swap_lora",
    "unstacked",
    "upcycle",
    "weight_map",
    "widen",
    "with_lora",
]
