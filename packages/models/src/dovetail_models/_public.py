"""The public names, which the package imports when the first one is asked for."""

from dovetail_models.bert import BertConfig, BertForMaskedLM, BertMaskedLMConfig, BertModel
from dovetail_models.conversion import convert
from dovetail_models.decoder import Decoder, DecoderConfig, StackConfig
from dovetail_models.deepseek_v2 import DeepseekV2, DeepseekV2Config
from dovetail_models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from dovetail_models.description import Description, ParameterGroup, describe
from dovetail_models.encoder import EncoderConfig
from dovetail_models.family import FAMILIES, Family
from dovetail_models.gemma2 import Gemma2, Gemma2Config
from dovetail_models.gemma3 import Gemma3, Gemma3Config
from dovetail_models.gemma3_multimodal import Gemma3Multimodal, Gemma3MultimodalConfig
from dovetail_models.gpt2 import Gpt2, Gpt2Config
from dovetail_models.gpt_oss import GptOss, GptOssConfig
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_fields import ConfigError
from dovetail_models.hub import HubError
from dovetail_models.huggingface import config_from_hf, config_to_hf, from_pretrained, save_pretrained, weight_map
from dovetail_models.llama import Llama, LlamaConfig
from dovetail_models.mamba2 import Mamba2, Mamba2Config
from dovetail_models.mistral import Mistral, MistralConfig
from dovetail_models.mixtral import Mixtral, MixtralConfig
from dovetail_models.mup import maximal_update
from dovetail_models.olmo2 import Olmo2, Olmo2Config
from dovetail_models.olmo3 import Olmo3, Olmo3Config
from dovetail_models.phi3 import Phi3, Phi3Config
from dovetail_models.qwen2 import Qwen2, Qwen2Config
from dovetail_models.qwen3 import Qwen3, Qwen3Config
from dovetail_models.qwen3_moe import Qwen3Moe, Qwen3MoeConfig
from dovetail_models.qwen3_next import Qwen3Next, Qwen3NextConfig
from dovetail_models.remat import ACTIVATIONS, POLICIES, Remat
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
from dovetail_models.vit import ViTClassifierConfig, ViTConfig, ViTForImageClassification, ViTModel

__all__ = [
    "ACTIVATIONS",
    "FAMILIES",
    "POLICIES",
    "BertConfig",
    "BertForMaskedLM",
    "BertMaskedLMConfig",
    "BertModel",
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
    "Family",
    "Fields",
    "Gemma2",
    "Gemma2Config",
    "Gemma3",
    "Gemma3Config",
    "Gemma3Multimodal",
    "Gemma3MultimodalConfig",
    "Gpt2",
    "Gpt2Config",
    "GptOss",
    "GptOssConfig",
    "HubError",
    "Llama",
    "LlamaConfig",
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
    "Remat",
    "SiglipConfig",
    "SiglipModel",
    "SiglipTextConfig",
    "SiglipTextModel",
    "SiglipVisionConfig",
    "SiglipVisionModel",
    "SmolLM3",
    "SmolLM3Config",
    "Stack",
    "StackConfig",
    "T5EncoderConfig",
    "T5EncoderModel",
    "ViTClassifierConfig",
    "ViTConfig",
    "ViTForImageClassification",
    "ViTModel",
    "abstract",
    "config_from_hf",
    "config_to_hf",
    "convert",
    "describe",
    "from_pretrained",
    "init",
    "logical_axes",
    "maximal_update",
    "merge",
    "placements",
    "save_pretrained",
    "split",
    "weight_map",
]
